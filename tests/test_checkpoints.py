"""`flux-ray checkpoint`, and the same from Python: what there is, whether it is whole, a model out of it."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flux_ray import FluxConfig, checkpoints
from flux_ray import __main__ as cli
from flux_ray.config import LoraConfig
from flux_ray.errors import UserError
from flux_ray.model import adapt, load_policy
from flux_ray.observability.run_folder import RunFolder
from flux_ray.records import LoopState
from flux_ray.run import manifest
from flux_ray.run.checkpoint import Best, checkpoint_folder, mark_best, save
from flux_ray.train import full_weights
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit


def checkpointed(run, step: int, tensors):
    folder = checkpoint_folder(run / "checkpoints", step)
    (folder / "trainer").mkdir(parents=True)
    save_file(tensors, folder / "trainer" / "model.safetensors")
    (folder / "trainer" / "state.json").write_text(json.dumps({"format": 2, "version": step, "dtype": "bfloat16"}))
    save(folder, LoopState(step=step, next_uid=3))
    manifest.write(folder)
    return folder


@pytest.fixture
def run(tmp_path):
    """Steps 1 to 4, of which the second is the best and the third is cut."""
    RunFolder(tmp_path / "run").create(FluxConfig(model_path="m", run_dir=str(tmp_path / "run")), resume_step=None)
    for step in (1, 2, 3, 4):
        folder = checkpointed(tmp_path / "run", step, {"master.a": torch.full((3,), float(step))})
        if step == 3:
            file = folder / "trainer" / "model.safetensors"
            file.write_bytes(file.read_bytes()[:-2])
    mark_best(tmp_path / "run" / "checkpoints", Best("eval/task_mean", 2, 0.5))
    return tmp_path / "run"


def test_list_and_verify(run, capsys):
    old = checkpoint_folder(run / "checkpoints", 1) / "driver.json"
    for file in old.parent.iterdir():
        os.utime(file, (time.time() - 7300, time.time() - 7300))
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert "step      1    2 h ago" in first and first.endswith("  whole")
    assert second.endswith("  whole  (best)") and fourth.endswith("whole")
    assert "trainer/model.safetensors has" in third and "manifest.json says" in third
    assert cli.main(["checkpoint", "verify", str(run)]) == 1
    newest = checkpoint_folder(run / "checkpoints", 4)
    assert cli.main(["checkpoint", "verify", str(newest)]) == 0
    file = newest / "trainer" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"xx")
    assert checkpoints.list_checkpoints(run)[-1].problem is None, "sizes alone are compared"
    (found,) = checkpoints.verify(newest)
    assert "its SHA-256 is another" in str(found.problem)
    assert cli.main(["checkpoint", "verify", str(newest)]) == 1


def test_prune_keeps_the_newest_and_the_best(run, capsys):
    assert cli.main(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert [one.step for one in checkpoints.list_checkpoints(run)] == [2, 4]
    with pytest.raises(UserError, match="one checkpoint stays at least"):
        checkpoints.prune(run, keep=0)


@pytest.mark.parametrize(("words", "text"), [
    (["lst", "."], "did you mean 'list'"), (["list"], "flux-ray checkpoint list RUN"),
    (["list", "nowhere"], "nowhere: no such folder"), (["list", "."], ". has no checkpoints"),
    (["prune", ".", "--keep", "few"], "flux-ray checkpoint prune RUN --keep K"),
    (["export", ".", "new"], ". is no checkpoint"), (["export", "."], "flux-ray checkpoint export CHECKPOINT FOLDER"),
])
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["checkpoint", *words]) == 2
    line = capsys.readouterr().err
    assert text in line and line.count("\n") == 1
    assert cli.main(["checkpoint", "--help"]) == 0 and "flux-ray checkpoint verify" in capsys.readouterr().out


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_is_made_out_of_a_checkpoint(tmp_path, lora, capsys):
    """What the trained parameters make of the model that the run began with, in the type that the run had."""
    options = {"train.lora.rank": 4, "train.lora.alpha": 8.0} if lora else {}
    start, run = tiny_model(tmp_path / "model", tied=True), tmp_path / "run"
    RunFolder(run).create(FluxConfig(model_path=str(start), run_dir=str(run), **options), resume_step=None)
    model = load_policy(start, dtype=torch.float32, chunk_tokens=64)
    if lora:
        model.adapter = adapt(model.hf, LoraConfig(rank=4, alpha=8.0), seed=0, train_head=False)
    masters = {}
    torch.manual_seed(1)
    for name, parameter in full_weights.parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
        masters[f"master.{name}"] = parameter.detach().clone()
    folder = checkpointed(run, 3, {**masters, **{key.replace("master", "exp_avg"): value + 1
                                                 for key, value in masters.items()}})
    before = load_file(start / "model.safetensors")
    if lora:   # what it is merged with, and by what, is of the run's type
        model.hf.bfloat16()
    wanted = {name: tensor.clone() for name, tensor in full_weights.iter_weights(model, 10**9)}

    assert cli.main(["checkpoint", "export", str(folder), str(tmp_path / "new")]) == 0
    assert str(tmp_path / "new") in capsys.readouterr().out
    exported = load_file(tmp_path / "new" / "model.safetensors")
    assert exported.keys() == before.keys()
    assert all(torch.equal(exported[name], wanted[name].bfloat16()) for name in exported)
    assert not torch.equal(exported["model.layers.0.mlp.up_proj.weight"].float(),
                           before["model.layers.0.mlp.up_proj.weight"])
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert opened.dtype == torch.bfloat16 and opened.generation_config.eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path / "new")("12+3").input_ids == [4, 5, 13, 6]
    assert cli.main(["checkpoint", "export", str(folder), str(tmp_path / "new")]) == 2
    assert "is there already" in capsys.readouterr().err
