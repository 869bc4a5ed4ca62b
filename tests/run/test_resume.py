"""Where a run goes on: resume=auto, what differs, what can't; and folders that are cut or can't be written."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from flux_ray import FluxConfig, run_dir
from flux_ray.__main__ import compose
from flux_ray.errors import UserError
from flux_ray.observability.run_folder import EVAL, METRICS, RunFolder, read_lines
from flux_ray.records import KeptGroup, LoopState
from flux_ray.run import manifest, resume
from flux_ray.run.checkpoint import STATE, checkpoint_folder, load, save
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit


def checkpointed(run, step: int, tensors=None, kept=()):
    folder = checkpoint_folder(run / "checkpoints", step)
    (folder / "trainer").mkdir(parents=True)
    save_file(tensors or {"master.a": torch.ones(3)}, folder / "trainer" / "model.safetensors")
    save(folder, LoopState(step=step, next_uid=3, unfinished=tuple(one.uid for one in kept), kept=kept))
    manifest.write(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    """A run of two steps with a checkpoint of each."""
    config = FluxConfig(model_path="m", group_size=8, num_steps=5, run_dir=str(tmp_path / "run"))
    folder = RunFolder(tmp_path / "run")
    folder.create(config, resume_step=None)
    for step in (1, 2):
        folder.metrics(step - 1, {"actor/loss": 0.5})
        checkpointed(tmp_path / "run", step)
    return tmp_path / "run"


def from_command_line(*words):
    composed = []
    compose(list(words), then=composed.append)
    return composed[0]


@pytest.mark.parametrize("make", [
    lambda **options: FluxConfig(**options),
    lambda **options: from_command_line(*(f"{key}={value}" for key, value in options.items())),
], ids=["python", "command line"])
def test_auto_goes_on_with_what_lies_in_run_dir_or_begins_there(run, make):
    config = make(**{"resume": "auto", "run_dir": str(run), "driver.num_steps": 9})
    assert (config.model.path, config.rollout.group_size, config.driver.num_steps) == ("m", 8, 9)
    assert config.resume == config.run_dir == str(run)
    start = resume.start(config)
    assert start.checkpoint == checkpoint_folder(run / "checkpoints", 2) and start.state.step == 2
    assert resume.changes(config) == [f"options that differ from those of {run}: driver.num_steps 5 -> 9"]

    new = make(**{"resume": "auto", "run_dir": str(run.parent / "new"), "model.path": "m"})
    start = resume.start(new)
    assert (start.config.resume, start.checkpoint, start.state) == (None, None, LoopState(step=0))
    with pytest.raises(UserError, match="resume=auto goes on with what lies in run_dir: name the folder"):
        make(resume="auto")


def test_auto_begins_anew_in_the_folder_of_a_run_that_made_no_checkpoint(tmp_path):
    folder = RunFolder(tmp_path)
    folder.create(FluxConfig(model_path="m", run_dir=str(tmp_path)), resume_step=None)
    folder.metrics(0, {"actor/loss": 0.5})
    folder.append(EVAL, {"step": 0, "eval/task_mean": 0.5})
    start = resume.start(FluxConfig(model_path="m", resume="auto", run_dir=str(tmp_path)))
    assert (start.config.resume, start.checkpoint, start.state.step) == (str(tmp_path), None, 0)
    folder.create(start.config, resume_step=0)
    assert read_lines(tmp_path / METRICS) == read_lines(tmp_path / EVAL) == []


def test_a_broken_checkpoint_is_passed_over_in_one_line(run):
    newest = checkpoint_folder(run / "checkpoints", 2)
    (newest / STATE).write_text((newest / STATE).read_text()[:20])
    start = resume.start(FluxConfig(resume=str(run)))
    assert start.checkpoint == checkpoint_folder(run / "checkpoints", 1)
    assert start.warnings == (f"{newest} is passed over: driver.json can't be read: Unterminated string starting at",)
    with pytest.raises(UserError, match=f"^resume={newest}: the checkpoint is broken: driver.json can't be read"):
        resume.start(FluxConfig(resume=str(newest)))
    with pytest.raises(UserError, match=r"its driver.json can't be read: Unterminated string starting at$"):
        load(newest)


@pytest.mark.parametrize("cut", ["", "algo: {name: gr", "- 1\n- 2\n", "\x00\x01", "just words"])
def test_a_config_that_was_cut_is_one_line(run, cut):
    (run / run_dir.CONFIG).write_text(cut)
    with pytest.raises(UserError, match=f"^resume={run}: {run}/config.yaml ") as raised:
        FluxConfig(resume=str(run))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("option", "value", "text"), [
    ("train.lora.rank", 4, "train.lora.rank was 0 and can't become 4"),
    ("driver.num_steps", 1, "driver.num_steps=1 is less than the 2 steps done"),
])
def test_what_can_t_change_is_refused(run, option, value, text):
    with pytest.raises(UserError, match=text):
        resume.start(FluxConfig(resume=str(run), **{option: value}))


def test_seed_and_batch_may_change_and_are_named(run):
    config = FluxConfig(resume=str(run), **{"seed": 3, "batch.prompts_per_step": 4, "eval.data": "e" * 100})
    before = FluxConfig().batch.prompts_per_step
    (line,) = resume.changes(resume.start(config).config)
    assert line.startswith(f"options that differ from those of {run}: ")
    assert "seed 0 -> 3" in line and f"batch.prompts_per_step {before} -> 4" in line and f"-> {'e' * 80}..." in line


@pytest.mark.parametrize(("option", "value", "are_kept"), [
    ("driver.num_steps", 9, True), ("checkpoint.keep", 7, True), ("train.learning_rate", 1e-5, True),
    ("rollout.temperature", 0.5, False), ("driver.max_staleness", 3, False), ("batch.prompts_per_step", 4, False),
    ("algo.beta", 0.5, False),
])
def test_finished_groups_are_trained_on_unless_an_option_shapes_others_now(run, option, value, are_kept):
    kept = (KeptGroup(2, "0.safetensors", 1, 1.0),)
    checkpointed(run, 3, kept=kept)
    start = resume.start(FluxConfig(resume=str(run), **{option: value}))
    assert start.state.unfinished == (2,) and start.state.kept == (kept if are_kept else ())
    told = () if are_kept else (f"1 finished group is sampled again, for {option} has changed",)
    assert start.warnings == told


def test_another_model_is_refused_where_a_shape_differs(tmp_path):
    small, alike, large = (tiny_model(tmp_path / name, tied=True, hidden=hidden)
                           for name, hidden in (("small", 64), ("alike", 64), ("large", 128)))
    run = tmp_path / "run"
    RunFolder(run).create(FluxConfig(model_path=str(small), run_dir=str(run)), resume_step=None)
    folder = checkpointed(run, 2, {"master.model.embed_tokens.weight": torch.ones(64, 64)})
    assert resume.start(FluxConfig(resume=str(run), model_path=str(alike))).checkpoint == folder
    with pytest.raises(UserError, match=f"model.path was {small} and can't become {large}: model.embed_tokens.weight "
                                        r"has shape \(64, 64\) in .*, \(64, 128\) there"):
        resume.start(FluxConfig(resume=str(run), model_path=str(large)))


def test_a_run_dir_that_can_t_be_written_to_is_one_line(tmp_path, monkeypatch):
    """As a read-only file system answers."""
    def refuses(path, *_, **__):
        raise OSError(30, os.strerror(30), str(path))

    monkeypatch.setattr("pathlib.Path.open", refuses)
    with pytest.raises(UserError, match=f"^run_dir={tmp_path}: can't be written to: Read-only file system$"), \
            run_dir.held(str(tmp_path)):
        raise AssertionError("held")
    with pytest.raises(UserError, match=f"^run_dir={tmp_path}: can't be written to: Read-only file system$"):
        RunFolder(tmp_path).create(FluxConfig(model_path="m"), resume_step=None)


def test_the_config_is_whole_or_as_it_was(run, monkeypatch):
    before = (run / run_dir.CONFIG).read_bytes()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        RunFolder(run).create(FluxConfig(resume=str(run), num_steps=7), resume_step=2)
    assert (run / run_dir.CONFIG).read_bytes() == before
    assert json.loads((run / METRICS).read_text().splitlines()[0])["step"] == 0
