"""A whole run of a mixture of experts: two engines, two ranks under ZeRO 3; what it measures and saves."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_ray import FluxConfig, FluxTrainer
from tests.families import make_family
from tests.house.documented import undocumented
from tests.system.program import metrics
from tests.system.small_run import MAX_GAP, options

pytestmark = [pytest.mark.system, pytest.mark.all, pytest.mark.timeout(400)]
NUM_STEPS = 3


def test_engines_and_trainer_agree_after_every_update_of_experts(toys, tmp_path: Path) -> None:
    model = make_family("Qwen 3 MoE", tmp_path / "mixture")
    values = options(toys, model) | {
        "driver.num_steps": NUM_STEPS, "rollout.num_engines": 2, "rollout.max_model_len": 64, "train.zero_stage": 3,
        "train.router_balance_coef": 0.01, "weights.bucket_mib": 1, "algo.beta": 0.1, "algo.router_replay": True}
    FluxTrainer(FluxConfig(algorithm="grpo", **values, run_dir=str(tmp_path / "run"))).fit(str(toys.data))
    lines = metrics(tmp_path / "run")
    last = lines[-1]
    assert max(line["weights/logprob_gap_max"] for line in lines) <= MAX_GAP and len(lines) == NUM_STEPS
    assert last["actor/grpo_kl"] > 0.05, "the policy hardly moved: agreement says nothing"
    assert {"router/balance", "router/load_max", "router/load_max/0", "router/load_max/1", "router/unused"} <= set(last)
    assert [line["rollout/router_agreement"] for line in lines] == [1.0] * NUM_STEPS, "in float32 all choose alike"
    assert not undocumented(last)
