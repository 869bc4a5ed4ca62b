"""The docs' own algorithm, from Python: it reaches every process; callbacks are called; an evaluation follows."""

from __future__ import annotations

import pytest

from flux_ray import Callback, FluxConfig, FluxTrainer
from flux_ray.cluster.plan import ENGINE
from flux_ray.observability.run_folder import EVAL, read_lines
from flux_ray.run_dir import saved_config

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

NUM_STEPS = 3


class Seen(Callback):
    def __init__(self):
        self.steps, self.evaluations = [], []

    def on_step(self, step, metrics):
        self.steps.append((step, metrics))

    def on_evaluation(self, step, metrics):
        self.evaluations.append((step, metrics))


@pytest.mark.parametrize("engines", ["serving", pytest.param("anew", marks=pytest.mark.all)])
def test_it_trains_and_is_evaluated(kept, toys, plugin, tmp_path, engines):
    """By engines that serve what was trained, or by new ones, which load it."""
    config = FluxConfig(
        model_path=str(toys.tied), plugins=[str(plugin)], run_dir=str(tmp_path / "run"), max_tokens=8,
        prompts_per_step=4, beta=0.0, learning_rate=1e-3, warmup_steps=0, mini_batches=2,
        **{"train.num_ranks": 2, "algo.estimator": "median", "algo.policy_loss": "soft_clip",
           "algo.options": {"slope": 2.0}, "reward.functions": ["digits", "length"], "reward.weights": [1.0, 0.1],
           "reward.combine": "each", "filter.reward": "digits", "eval.max_rows": 6},
    )
    seen = Seen()
    with FluxTrainer(config) as trainer:
        with kept():
            result = trainer.fit(str(toys.data), num_steps=NUM_STEPS, callbacks=[seen])
        with kept(anew=[ENGINE] if engines == "anew" else ()):
            measured = trainer.evaluate(str(toys.data))
    assert [step for step, _ in seen.steps] == list(range(NUM_STEPS)) and len(result.history) == NUM_STEPS
    for _, metrics in seen.steps:
        assert metrics["actor/log_ratio"] != 0.0, "the second update of a batch has a ratio: the loss is ours"
        assert 0 < metrics["reward/digits"] <= 1 and metrics["reward/length"] < 0
        assert metrics["filter/acceptance_rate"] <= 1
    assert measured["eval/prompts"] == 6 and 0 <= measured["eval/digits"] <= 1
    evaluated = saved_config(str(result.run_dir / "evaluation"))
    assert evaluated["model"]["path"] == str(result.model_path)
    (line,) = read_lines(result.run_dir / "evaluation" / EVAL)
    assert line["eval/digits"] == measured["eval/digits"] and len(line["answers"]) == 6
