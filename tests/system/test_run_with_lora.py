"""A whole run with LoRA: engines serve the merged weights, no reference actor is there, model and adapter come out."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flux_ray import FluxConfig, FluxTrainer
from tests.system.program import metrics, numbers
from tests.system.small_run import assert_agreement, options

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NUM_STEPS, CHECKPOINT_AT = 4, 2


def configured(toys, run_dir: Path, **more):
    values = options(toys, toys.tied) | {
        "driver.num_steps": NUM_STEPS, "algo.beta": 0.1, "train.learning_rate": 3e-2,
        "train.zero_stage": 2, "train": {"lora": {"rank": 8, "dropout": 0.0}}, "checkpoint.every": CHECKPOINT_AT,
    }
    return FluxConfig(algorithm="grpo", **values, **more, run_dir=str(run_dir))


@pytest.fixture(scope="module")
def adapted(kept, toys, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    with kept():
        FluxTrainer(configured(toys, run_dir)).fit(prompts=str(toys.data))
    return run_dir


def test_engines_and_trainer_agree_and_the_reference_is_the_base(adapted, toys):
    assert_agreement(adapted, toys.tied, NUM_STEPS)
    kl = [line["actor/grpo_kl"] for line in metrics(adapted)]
    assert kl[0] == 0.0 and min(kl[1:]) > 0, "the first step's policy is the base, those after it are not"
    started = (adapted / "run.log").read_text().split("starting ")[1].splitlines()[0]
    assert "2 trainer" in started and "reference" not in started


def test_model_and_adapter_are_written(adapted, toys):
    """The model as the base is laid out, which vLLM has loaded; the adapter on the base is the model."""
    merged, base = load_file(adapted / "model" / "model.safetensors"), load_file(toys.tied / "model.safetensors")
    assert {n: (w.shape, w.dtype) for n, w in merged.items()} == {n: (w.shape, w.dtype) for n, w in base.items()}
    moved = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    assert moved and all("_proj" in name for name in moved) and len(moved) == 14
    config = json.loads((adapted / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(toys.tied) and config["r"] == 8
    ids = torch.arange(3, 40)[None]
    model = AutoModelForCausalLM.from_pretrained(adapted / "model").eval()
    base_model = AutoModelForCausalLM.from_pretrained(toys.tied)
    policy = peft.PeftModel.from_pretrained(base_model, adapted / "adapter").eval()
    assert (model(input_ids=ids).logits - policy(input_ids=ids).logits).abs().max() < 5e-5
    stored = load_file(adapted / "checkpoints" / f"step-{CHECKPOINT_AT:06d}" / "trainer" / "model.safetensors")
    assert stored and all("lora_" in name for name in stored)


@pytest.mark.all  # tests/train shows it of ranks alone, tests/system/test_each_algorithm.py of a run
def test_resumed_it_goes_on_as_if_nothing_had_happened(adapted, kept, toys):
    run_dir = adapted.parent / "resumed"
    checkpoint = adapted / "checkpoints" / f"step-{CHECKPOINT_AT:06d}"
    with kept():
        FluxTrainer(configured(toys, run_dir, resume=str(checkpoint))).fit(prompts=str(toys.data))
    assert numbers(metrics(run_dir)) == numbers(metrics(adapted)[CHECKPOINT_AT:])
    for name in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        first, second = load_file(adapted / name), load_file(run_dir / name)
        assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
