"""A short run of every algorithm on real engines, trainers and references: its options work, the two sides agree."""

from __future__ import annotations

import math

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from flux_ray import FluxConfig, FluxTrainer, algo
from tests.house.documented import undocumented
from tests.model.test_score import written
from tests.system.program import NUMBERS, metrics
from tests.system.small_run import MAX_GAP

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NUM_STEPS = 2
SHARDED = {"train.zero_stage": 3, "train.gradient_checkpointing": True}
#: What is switched on beside an algorithm's own preset, so that each option has a run.
OPTIONS: dict[str, dict] = {
    "grpo": {"dual_clip": 3.0, "epochs": 2},
    "dr_grpo": {"train.zero_stage": 3},
    "gspo": {"off_policy": "tis", "mini_batches": 2},
    "gspo_token": {"off_policy": "icepop", "mini_batches": 2},
    "rloo": {"epochs": 2, "mini_batches": 2, "train.zero_stage": 2},
    "ppo": {"train.lora.rank": 4, **SHARDED, "dual_clip": 3.0},
    "reinforce_pp": {"kl_target": 1.0, "kl_horizon": 16.0, "mini_batches": 2},
    "reinforce_pp_baseline": {"reward.functions": ["digits", "length"], "reward.combine": "each"},
    "cispo": {"off_policy": "tis", "mini_batches": 2},
}
KL_IN_REWARD = {"ppo", "rloo", "reinforce_pp"}
#: One of each way through the loop is run by default. What the others compute, tests/algo shows.
ALWAYS = {"grpo", "gspo", "reinforce_pp"}  # and ppo, below
WITH_REFERENCE = KL_IN_REWARD | {"grpo", "grpo_vectorized", "reinforce_pp_baseline"}


@pytest.fixture
def run(kept, toys, tmp_path):
    """The lines of a short run of an algorithm; its model is in tmp_path/run/model."""

    def fit(name: str, **more) -> list[dict]:
        options = {"model.path": str(toys.tied), "rollout.max_tokens": 8, "batch.prompts_per_step": 4, "num_ranks": 2,
                   "train.learning_rate": 1e-3, "train.warmup_steps": 0, "num_steps": NUM_STEPS, "progress": False,
                   "reward.functions": ["digits"], "run_dir": str(tmp_path / "run"), **OPTIONS.get(name, {}), **more}
        given = [f"{toys.rewards}:{f}" if f == "digits" else f for f in options["reward.functions"]]
        config = FluxConfig(algorithm=name, **{**options, "reward.functions": given})
        with kept():
            result = FluxTrainer(config).fit(str(toys.data))
        assert result.num_steps == options["num_steps"]
        lines = metrics(result.run_dir)
        assert undocumented(name for line in lines for name in line) == []
        return lines

    return fit


@pytest.mark.parametrize("name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.all)
                                  for name in algo.ALGORITHMS])
def test_a_short_run(name, run, toys, tmp_path):
    lines = run(name)
    options = OPTIONS.get(name, {})
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    for line in lines:
        assert line["weights/logprob_gap_max"] <= MAX_GAP
        assert math.isfinite(line["actor/loss"]) and line["train/grad_norm"] > 0 and line["actor/adv_std"] > 0
        several = options.get("epochs", 1) * options.get("mini_batches", 1) > 1
        assert (line["actor/ratio_mean"] == pytest.approx(1.0, abs=1e-7)) != several, "later updates have a ratio"
        assert ("actor/grpo_kl" in line) == (name in WITH_REFERENCE)
        assert ("actor/reward_kl" in line) == (name in KL_IN_REWARD)
    if "kl_target" in options:
        assert lines[1]["actor/kl_coef"] != lines[0]["actor/kl_coef"]
    before, after = (load_file(folder / "model.safetensors") for folder in (toys.tied, tmp_path / "run" / "model"))
    assert any((before[key] != after[key]).any() for key in before)


@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.all)])  # tests/train resumes it too
def test_ppo_on_a_reward_model_beside_a_rule(run, toys, tmp_path, goes_on):
    """The critic learns, alone at first; it is in the checkpoint. `goes_on`: the run does, from there, exactly."""
    judge = written(toys.tied, tmp_path / "judge")
    options = {
        "reward.functions": ["digits", f"model:{judge}"], "reward.weights": [1.0, 0.1], "critic.warmup_steps": 2,
        "critic.learning_rate": 1e-2, "epochs": 2, "mini_batches": 2, "kl_target": 1.0, "num_steps": 6,
        "checkpoint.every": 3, "checkpoint.keep": 2, "train.lora.rank": 0,  # all of the critic learns, and fast
    }
    lines = run("ppo", **options)
    assert [("actor/loss" in line) for line in lines] == [False, False, True, True, True, True]
    for line in lines:
        assert line["reward/mean"] == pytest.approx(line["reward/digits"] + 0.1 * line["reward/judge"], abs=1e-9)
        assert line["critic/grad_norm"] > 0 and line["critic/step_s"] > 0 and "actor/reward_kl" in line
        assert {"critic/clip_frac", "critic/return_mean", "critic/learning_rate"} <= set(line)
    explained = [line["critic/explained_variance"] for line in lines]
    assert explained[0] == 0 and sum(explained[3:]) > 0, explained
    assert lines[0]["critic/value_mean"] == 0   # its head starts at 0
    assert lines[3]["critic/loss"] < lines[0]["critic/loss"]

    folder = tmp_path / "run"
    checkpoint = folder / "checkpoints" / "step-000003"
    assert {path.name for path in checkpoint.iterdir()} == {"trainer", "critic", "driver.json", "manifest.json"}
    assert AutoModelForSequenceClassification.from_pretrained(folder / "critic").config.num_labels == 1
    if not goes_on:
        return
    again = run("ppo", **options, resume=str(checkpoint), run_dir=str(tmp_path / "resumed"))
    watched = (*NUMBERS, "critic/loss", "critic/explained_variance", "actor/kl_coef", "reward/judge")
    went_on, resumed = ([[line[name] for name in watched] for line in of] for of in (lines[3:], again))
    assert resumed == went_on
