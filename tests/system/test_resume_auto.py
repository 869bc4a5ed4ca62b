"""A run that is broken off and started again by the same words: it goes on from what is whole, and keeps its best."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from flux_ray import FluxConfig, FluxTrainer, checkpoints
from flux_ray.errors import RunFailed
from flux_ray.observability.run_folder import EVAL, read_lines
from tests.system.program import metrics

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NUM_STEPS = 4
LOSS = "eval/loss"


def test_auto_goes_on_from_what_is_whole_and_the_best_is_kept(kept, toys, tmp_path):
    def trained(name, callback=None):
        config = FluxConfig(resume="auto", model_path=str(toys.untied), algorithm="sft", **{
            "run_dir": str(tmp_path / name), "train.num_ranks": 2, "train.learning_rate": 1e-3,
            "train.warmup_steps": 0, "batch.prompts_per_step": 8, "num_steps": NUM_STEPS, "eval.data": str(toys.data),
            "eval.every": 1, "checkpoint.every": 2, "checkpoint.keep": 2, "checkpoint.best": f"-{LOSS}"})
        with kept():
            return FluxTrainer(config).fit(str(toys.data), callbacks=[callback] if callback else [])

    def breaks_off(step, _):
        if step + 1 == NUM_STEPS:
            raise KeyError("pulled the plug")

    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoints"
    with pytest.raises(RunFailed, match="pulled the plug"):
        trained("run", breaks_off)
    assert not (run / "model").exists()
    broken = folder / "step-000003"   # its save was under way
    if not broken.exists():
        shutil.copytree(folder / "step-000002", broken)
    (broken / "driver.json").write_text('{"step": 3, "ne')

    result = trained("run")
    assert [line["step"] for line in metrics(run)] == list(range(NUM_STEPS))
    assert len(result.history) == NUM_STEPS - 2, "it went on from step 2"
    assert f"{broken} is passed over: driver.json can't be read" in (run / "run.log").read_text()
    scores = {line["step"]: line[LOSS] for line in read_lines(run / EVAL) if line["step"]}
    marked = json.loads((folder / "best.json").read_text())
    assert marked == {"metric": f"-{LOSS}", "step": min(scores, key=lambda step: scores[step]),
                      "value": min(scores.values())}
    found = {one.step: one for one in checkpoints.verify(run)}
    assert found.keys() == {marked["step"], NUM_STEPS - 1, NUM_STEPS}
    assert all(one.state == "whole" for one in found.values())
    assert found[marked["step"]].is_best

    whole_run = trained("another")   # which nothing disturbs
    of_model = load_file(whole_run.model_path / "model.safetensors")
    for model in (result.model_path, checkpoints.export(found[NUM_STEPS].path, tmp_path / "exported")):
        again = load_file(model / "model.safetensors")
        assert again.keys() == of_model.keys() and all(torch.equal(again[name], of_model[name]) for name in of_model)
