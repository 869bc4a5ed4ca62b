"""The whole loop with generation and training side by side: the bound holds, rollouts go on under new weights."""

from __future__ import annotations

import math

import pytest

from flux_ray import FluxConfig, FluxTrainer
from tests.house.documented import undocumented
from tests.system.program import metrics
from tests.system.small_run import assert_agreement, options

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NUM_STEPS = 8


def test_partial_rollouts_go_on_after_an_update_within_the_bound(kept, toys, tmp_path):
    """Groups split over two engines, responses so long that updates come under them. GPT-2's tied head and
    embedding have names of their own."""
    values = options(toys, toys.gpt2) | {
        "driver.max_staleness": 1, "driver.num_steps": NUM_STEPS, "rollout.num_engines": 2, "rollout.split_groups": 2,
        "rollout.max_tokens": 48, "rollout.ignore_eos": True, "filter.reward": "task",
        "rollout.max_num_seqs": 8,  # half of what a step has for an engine: its groups come in two rounds
        "batch.max_tokens_per_micro_batch": 256,  # of about 1,800 a step: backward begins before the batch is whole
    }
    with kept(other_engines=True):
        result = FluxTrainer(FluxConfig(algorithm="grpo", **values, run_dir=str(tmp_path / "run"))).fit(str(toys.data))
    assert_agreement(result.run_dir, toys.gpt2, num_steps=NUM_STEPS)
    lines = metrics(result.run_dir)
    assert undocumented(name for line in lines for name in line) == []
    assert max(line["driver/staleness_max"] for line in lines) == 1, "0 would be synchronous, 2 beyond the bound"
    assert any(line["rollout/spanning_frac"] > 0 for line in lines), "no update came under a running request"
    assert any(line["driver/num_parts"] > 1 for line in lines), "no group was trained on before the batch was whole"
    for line in lines:
        assert line["rollout/response_length_mean"] == 48 and line["rollout/tokens"] == 8 * 4 * 48, "none was cut short"
        assert line["filter/surplus"] == 0, "nothing is thrown away for the bound"
        assert math.isfinite(line["actor/loss"]) and 0 < line["filter/acceptance_rate"] <= 1
    assert any(line["filter/length_issued"] == 48 for line in lines if "filter/length_issued" in line)
