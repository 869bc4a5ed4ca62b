"""Which checkpoints count and can be trusted, and which go; what their driver.json says; when one is due."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.records import KeptGroup, LoopState
from flux_ray.run import manifest
from flux_ray.run.checkpoint import (
    BEST,
    STATE,
    Best,
    Due,
    best,
    checkpoint_folder,
    find,
    forget_newer,
    load,
    mark_best,
    newest_whole,
    prune,
    save,
    verify,
    whole,
)

pytestmark = pytest.mark.unit


@pytest.fixture
def checkpoints(tmp_path):
    """Those of a run: steps 2, 4 and 6 are whole, the save of step 8 was interrupted."""
    for step in (2, 4, 6, 8):
        folder = checkpoint_folder(tmp_path / "checkpoints", step)
        (folder / "trainer").mkdir(parents=True)
        if step < 8:
            save(folder, LoopState(step=step, next_uid=0))
            manifest.write(folder)
    return tmp_path / "checkpoints"


def test_resuming_from_an_older_checkpoint_forgets_the_newer(checkpoints):
    assert find(str(checkpoints.parent))[0].name == "step-000006"
    forget_newer(checkpoints, 2)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert find(str(checkpoints.parent))[0].name == "step-000002"
    new = checkpoint_folder(checkpoints, 3)
    new.mkdir()
    save(new, LoopState(step=3, next_uid=0))
    prune(checkpoints, 1)
    assert whole(checkpoints) == [new], "the checkpoint just made is the newest"


def test_nothing_newer_nothing_forgotten(checkpoints):
    (checkpoints / "step-notes").mkdir()
    forget_newer(checkpoints, 8)
    assert len(list(checkpoints.iterdir())) == 5


def test_what_is_saved_is_read_again(tmp_path):
    state = LoopState(step=3, next_uid=17, unfinished=(9, 12), prompts_dropped=5, version=7,
                      kept=(KeptGroup(9, "0.safetensors", 2, 1.5),), steps_of={6: 2, 7: 3})
    save(tmp_path, state)
    assert load(tmp_path) == state


def test_a_checkpoint_without_a_version_is_read_and_its_version_is_its_step(tmp_path):
    """It is of a time when both were one number."""
    (tmp_path / STATE).write_text(json.dumps({"step": 3, "next_uid": 17, "unfinished": [9, 12], "prompts_dropped": 5}))
    assert load(tmp_path) == LoopState(step=3, next_uid=17, unfinished=(9, 12), prompts_dropped=5, version=3)


@pytest.mark.parametrize("change", [
    {"flavour": 1}, {"unfinished": None}, {"step": None, "steps_done": 3},
])
def test_a_checkpoint_of_another_kind_is_refused_in_one_line(tmp_path, change):
    save(tmp_path, LoopState(step=3, next_uid=17))
    values = json.loads((tmp_path / STATE).read_text()) | change
    (tmp_path / STATE).write_text(json.dumps({name: value for name, value in values.items() if value is not None}))
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"checkpoint {tmp_path}: its driver.json isn't one that this version reads: ")
    assert next(iter(change)) in text and "\n" not in text


NAMES = ("trainer/model.safetensors", "trainer/random.safetensors", "trainer/state.json", STATE, manifest.MANIFEST)


def written(checkpoints, step: int, value: float | None = None):
    """A checkpoint with real tensors, all of them as large as its step."""
    folder = checkpoint_folder(checkpoints, step)
    (folder / "trainer").mkdir(parents=True)
    values = torch.full((7, 9), float(step) if value is None else value)
    save_file({"master.a": values, "exp_avg.a": values + 1, "exp_avg_sq.a": values + 2}, folder / NAMES[0])
    save_file({"cpu.0": torch.arange(200, dtype=torch.uint8)}, folder / NAMES[1])
    (folder / NAMES[2]).write_text(json.dumps({"format": 2, "version": step, "num_updates": step, "kl_coef": 0.0}))
    save(folder, LoopState(step=step, next_uid=8 * step))
    manifest.write(folder)
    return folder


def test_of_a_checkpoint_that_is_damaged_anywhere_nothing_is_taken(tmp_path):
    """200 times: a file cut, a bit turned, a stretch of zeros, or a file missing, wherever it falls."""
    older, newer = written(tmp_path, 3), written(tmp_path, 5)
    assert newest_whole(tmp_path) == (newer, [])
    whole_one, draw, kinds = tmp_path / "kept", np.random.default_rng(0), set()
    shutil.copytree(newer, whole_one)
    for _ in range(200):
        name, kind = draw.choice(NAMES), draw.choice(["cut", "bit", "zeros", "missing"])
        file = newer / name
        content = bytearray(file.read_bytes())
        at = int(draw.integers(len(content)))
        if kind == "missing":
            file.unlink()
        else:
            if kind == "cut":
                content = content[:at]
            elif kind == "bit":
                content[at] ^= 1 << int(draw.integers(8))
            else:
                content[at:at + 16] = bytes(len(content[at:at + 16]))
            if content == file.read_bytes():   # zeros where zeros were
                continue
            file.write_bytes(content)
        found, lines = newest_whole(tmp_path)
        harmless = name == manifest.MANIFEST and found == newer and kind in ("bit", "cut")
        assert found == older or harmless, (name, kind, at)
        if found == older:
            (line,) = lines
            assert line.startswith(f"{newer} is passed over: ") and "\n" not in line
            kinds.add((name, kind))
        assert float(load_file(found / NAMES[0])["master.a"][0, 0]) == load(found).step
        shutil.rmtree(newer)
        shutil.copytree(whole_one, newer)
    assert len(kinds) >= 18, "of five files and four ways nearly all have come"


def test_each_damage_is_named(tmp_path):
    folder = written(tmp_path / "checkpoints", 5)
    content = (folder / NAMES[0]).read_bytes()
    size = len(content)
    for damage, text in [
        (lambda file: file.write_bytes(content[:-9]), f"trainer/model.safetensors has {size - 9} bytes, manifest.json "
                                                      f"says {size}"),
        (lambda file: file.write_bytes(content[:-9] + bytes(9)), "trainer/model.safetensors isn't what was written"),
        (lambda file: file.unlink(), "trainer/model.safetensors is missing"),
    ]:
        damage(folder / NAMES[0])
        assert str(verify(folder).problem).startswith(text)
        with pytest.raises(UserError, match=f"^resume={folder}: the checkpoint is broken: trainer/model"):
            find(str(folder))
        with pytest.raises(UserError, match=f"^resume={tmp_path}: no whole checkpoint in .*: .* is passed over: trai"):
            find(str(tmp_path))
        (folder / NAMES[0]).write_bytes(content)
    assert find(str(folder)) == (folder, [])
    (folder / manifest.MANIFEST).unlink()
    assert verify(folder).problem == "manifest.json is missing"
    (folder / STATE).write_text('{"step": 5, "next')
    assert str(verify(folder).problem).startswith("driver.json can't be read: Unterminated string")
    (folder / STATE).unlink()
    assert str(verify(folder).problem).startswith("driver.json is missing")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_passed_over(tmp_path, value):
    older, newer = written(tmp_path, 3), written(tmp_path, 5, value)
    found, (line,) = newest_whole(tmp_path)
    assert found == older
    assert line.startswith(f"{newer} is passed over: trainer/model.safetensors: ") and line.endswith("isn't finite")


def test_a_checkpoint_of_an_earlier_version_is_read_and_said_to_be_unverified(tmp_path):
    folder = written(tmp_path / "checkpoints", 5)
    (folder / manifest.MANIFEST).unlink()
    (folder / STATE).write_text(json.dumps({"step": 5, "next_uid": 40, "unfinished": [], "prompts_dropped": 0}))
    found, (line,) = find(str(tmp_path))
    assert found == folder and line.startswith(f"{folder} is unverified") and load(found).next_uid == 40
    (folder / NAMES[0]).write_bytes((folder / NAMES[0]).read_bytes()[:-9])
    assert "trainer/model.safetensors can't be read" in str(verify(folder).problem)


def test_the_best_outlives_the_newest(tmp_path):
    for step in range(1, 7):
        written(tmp_path, step)
    mark_best(tmp_path, Best("eval/task_mean", 2, 0.5))
    (tmp_path / ".step-000007.writing").mkdir()
    gone = prune(tmp_path, 2)
    assert [path.name for path in whole(tmp_path)] == ["step-000002", "step-000005", "step-000006"]
    assert [path.name for path in gone] == ["step-000001", "step-000003", "step-000004", ".step-000007.writing"]
    forget_newer(tmp_path, 5)
    assert best(tmp_path) == Best("eval/task_mean", 2, 0.5)
    forget_newer(tmp_path, 1)
    assert best(tmp_path) is None and not (tmp_path / BEST).exists()
    assert Best("-eval/loss", 1, 2.0).score < Best("-eval/loss", 1, 1.0).score
    (tmp_path / BEST).write_text('{"metric": "eval/ta')
    assert best(tmp_path) is None


@pytest.mark.parametrize(("every", "every_s", "expected"), [
    (2, 0, [False, True, False, True]), (0, 0, [False] * 4), (0, 25.0, [False, False, True, False]),
    (3, 15.0, [False, True, True, False]),
])
def test_a_checkpoint_is_due_by_steps_or_by_seconds(every, every_s, expected):
    due, found = Due(from_dict({"checkpoint.every": every, "checkpoint.every_s": every_s}), 100.0), []
    for step in range(1, 5):
        now_s = 100.0 + 10.0 * step
        found.append(due.is_due(step, now_s))
        if found[-1]:
            due.saved(now_s)
    assert found == expected
