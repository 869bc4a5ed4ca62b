"""An engine that computes another model than the trainer: the run ends at its first check, before it trains."""

from __future__ import annotations

import pytest

from flux_ray import FluxConfig, FluxTrainer
from flux_ray.errors import UserError
from tests.families import WINDOW, make_family
from tests.system.program import metrics

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]


def test_a_window_that_engine_and_trainer_read_differently_ends_the_run(kept, toys, tmp_path):
    """The engine is told of a window of half the length, by an option that users have."""
    model = make_family("Mistral", tmp_path / "model")
    config = FluxConfig(algorithm="grpo", run_dir=str(tmp_path / "run"), **{
        "model.path": str(model), "rollout.max_tokens": 32, "batch.prompts_per_step": 4, "driver.num_steps": 1,
        "train.num_ranks": 2, "rollout.kv_cache_gib": 0.1, "algo.beta": 0.0,
        "reward.functions": [f"{toys.rewards}:digits"],
        "rollout.engine_args.hf_overrides": {"sliding_window": WINDOW // 2}})
    with kept(other_engines=True), pytest.raises(UserError) as told:
        FluxTrainer(config).fit(prompts=str(toys.data))
    text = str(told.value)
    assert text.startswith("engine 0 and the trainer give the same tokens other log-probs under the same weights")
    position = int(text.partition("from position ")[2].split()[0])
    assert position >= WINDOW // 2, "within the shorter window the two agree"
    assert "from the engine" in text and "from the trainer" in text and "weights.allow_logprob_gap=true" in text
    assert not metrics(tmp_path / "run") and not (tmp_path / "run" / "model").exists()
    assert "ready" in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
