"""Runs without rollouts, on two ranks: DPO with a reference actor, whose held-out pairs are learned and which a resume
asks nothing; completions."""

from __future__ import annotations

import random

import pytest

from flux_ray import FluxConfig, FluxTrainer
from flux_ray.observability.run_folder import EVAL, METRICS, REFERENCE, read_lines
from tests.house.documented import undocumented
from tests.system.program import metrics

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NUM_STEPS, CHECKPOINT_AT = 8, 4


def preferences(seed: int, count: int) -> list[dict]:
    """The reply in digits is the better one."""
    rng = random.Random(seed)
    return [{"prompt": f"{rng.randrange(100)}+{rng.randrange(100)}=", "chosen": str(rng.randrange(100, 999)),
             "rejected": "".join(rng.choices("abcdefgh", k=3))} for _ in range(count)]


def test_dpo_end_to_end(kept, toys, tmp_path):
    config = FluxConfig(model_path=str(toys.tied), algorithm="dpo", **{
        "train.num_ranks": 2, "train.learning_rate": 1e-3, "train.warmup_steps": 0, "batch.prompts_per_step": 16,
        "checkpoint.every": CHECKPOINT_AT, "run_dir": str(tmp_path / "run")})
    with kept(), FluxTrainer(config) as trainer:
        result = trainer.fit(prompts=preferences(0, 48), eval_prompts=preferences(1, 20), num_steps=NUM_STEPS)
    lines, evaluations = metrics(result.run_dir), read_lines(result.run_dir / EVAL)
    assert undocumented(name for line in [*lines, *evaluations] for name in line) == []
    assert lines[0]["train/loss"] == pytest.approx(0.6931, abs=1e-3)   # the policy is its reference still
    assert abs(lines[0]["pairs/margin"]) < 1e-4 < lines[-1]["pairs/margin"]
    assert [line["step"] for line in evaluations] == [0, NUM_STEPS]
    assert evaluations[-1]["eval/accuracy"] == 1.0 and evaluations[-1]["eval/loss"] < evaluations[0]["eval/loss"] - 0.05
    assert (result.model_path / "model.safetensors").is_file()
    assert len(read_lines(result.run_dir / REFERENCE)) == 48 + 20   # each pair once

    again = FluxConfig(**{
        "model.path": str(toys.tied), "algorithm": "dpo", "data.train": str(tmp_path / "run" / "data.jsonl"),
        "train.num_ranks": 2, "train.learning_rate": 1e-3, "train.warmup_steps": 0, "batch.prompts_per_step": 16,
        "num_steps": NUM_STEPS, "run_dir": str(tmp_path / "resumed"),
        "resume": str(tmp_path / "run" / "checkpoints" / f"step-{CHECKPOINT_AT:06d}")})
    with kept():
        resumed = FluxTrainer(again).fit()
    again = read_lines(resumed.run_dir / METRICS)
    assert [line["step"] for line in again] == list(range(CHECKPOINT_AT, NUM_STEPS))
    for line, first in zip(again, lines[CHECKPOINT_AT:], strict=True):
        assert all(line[name] == first[name] for name in ("train/loss", "pairs/margin", "train/grad_norm"))
    assert read_lines(resumed.run_dir / REFERENCE) == []   # what the first run has written is known


def test_completions_end_to_end(kept, toys, tmp_path):
    config = FluxConfig(model_path=str(toys.untied), algorithm="sft", **{
        "train.num_ranks": 2, "train.learning_rate": 1e-3, "train.warmup_steps": 0, "batch.prompts_per_step": 8,
        "num_steps": 3, "run_dir": str(tmp_path / "run")})
    with kept():
        result = FluxTrainer(config).fit(str(toys.data))
    lines = metrics(result.run_dir)
    assert [line["driver/version"] for line in lines] == [1, 2, 3]
    assert undocumented(name for line in lines for name in line) == []
    assert lines[-1]["train/loss"] < lines[0]["train/loss"]
    assert (result.model_path / "model.safetensors").is_file()
