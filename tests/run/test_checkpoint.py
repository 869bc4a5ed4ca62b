"""Which checkpoints count, and which go; what their driver.json says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flux_ray.cluster.group import ActorError
from flux_ray.errors import UserError
from flux_ray.records import LoopState
from flux_ray.run.checkpoint import (
    STATE,
    checkpoint_folder,
    find,
    forget_newer,
    load,
    prune,
    save,
    save_models,
    save_whole,
    whole,
)
from tests.fakes.actors import LocalGroup

pytestmark = pytest.mark.unit


@pytest.fixture
def checkpoints(tmp_path):
    """Those of a run: steps 2, 4 and 6 are whole, the save of step 8 was interrupted."""
    for step in (2, 4, 6, 8):
        folder = checkpoint_folder(tmp_path / "checkpoints", step)
        (folder / "trainer").mkdir(parents=True)
        if step < 8:
            save(folder, LoopState(step=step, next_uid=0))
    return tmp_path / "checkpoints"


def test_resuming_from_an_older_checkpoint_forgets_the_newer(checkpoints):
    assert find(str(checkpoints.parent)).name == "step-000006"
    forget_newer(checkpoints, 2)
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    assert find(str(checkpoints.parent)).name == "step-000002"
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
    state = LoopState(step=3, next_uid=17, unfinished=(9, 12), prompts_dropped=5, version=7)
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


class Saves:
    """A rank that writes a file, or fails to."""

    def __init__(self, index: int, *, fails: bool = False) -> None:
        self._name, self._fails = f"{index}.bin", fails

    def save_checkpoint(self, folder: str) -> None:
        if self._fails:
            raise OSError("the disk is full")
        self.save_model(folder)

    def save_model(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / self._name).touch()


async def test_a_checkpoint_has_all_that_is_trained_and_older_ones_go(checkpoints):
    trained = [LocalGroup("trainer", Saves, 2), LocalGroup("critic", Saves, 1)]
    await save_whole(checkpoints, LoopState(step=9, next_uid=3), trained, keep=2, deadline_s=5)
    assert [path.name for path in whole(checkpoints)] == ["step-000006", "step-000009"]
    folder = find(str(checkpoints.parent))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "critic/0.bin", "driver.json", "trainer/0.bin", "trainer/1.bin"]


async def test_a_checkpoint_that_a_rank_could_not_write_does_not_count(checkpoints):
    trained = [LocalGroup("trainer", lambda index: Saves(index, fails=index == 1), 2)]
    with pytest.raises(ActorError, match="trainer 1, save_checkpoint: OSError: the disk is full"):
        await save_whole(checkpoints, LoopState(step=9, next_uid=3), trained, keep=1, deadline_s=5)
    assert [path.name for path in whole(checkpoints)] == ["step-000002", "step-000004", "step-000006"]


async def test_each_model_that_was_trained_is_in_its_folder(tmp_path):
    trained = [LocalGroup("trainer", Saves, 2), LocalGroup("critic", Saves, 1)]
    await save_models(tmp_path / "model", trained, deadline_s=5)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.bin")) == [
        "critic/0.bin", "model/0.bin", "model/1.bin"]
