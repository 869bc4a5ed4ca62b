"""The rollouts of a real run on disk, and its steps replayed from them."""

from __future__ import annotations

import json

import numpy as np
import pandas
import pytest

from flux_ray.__main__ import main
from flux_ray.errors import UserError
from flux_ray.observability import rollouts
from flux_ray.replay import replay
from tests.system.program import metrics
from tests.system.small_run import NUM_STEPS

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

COMPARED = ("actor/loss", "actor/adv_mean", "actor/adv_std", "actor/clip_frac", "actor/entropy", "reward/mean")


def test_every_sample_of_every_step_is_there(whole):
    assert rollouts.steps(whole) == list(range(NUM_STEPS))
    for line in metrics(whole):
        table = rollouts.read(whole, line["step"]).to_pandas()
        assert len(table) == 8 * 4 and set(table["outcome"]) == {"trained"} and set(table["engine"]) <= {0, 1}
        assert table["num_tokens"].sum() == line["rollout/tokens"]
        assert table["reward"].mean() == pytest.approx(line["reward/mean"])
        for row in table.itertuples():
            assert row.reward == pytest.approx(sum(c.isdigit() for c in row.response) / 16)
            mask = row.loss_mask
            assert np.isfinite(row.policy_logprobs[mask]).all()
            assert np.abs(row.policy_logprobs[mask] - row.sampler_logprobs[mask]).max(initial=0) < 2e-5
            assert set(row.versions[mask]) <= {line["step"]}
            assert row.generate_s > 0 and row.score_s > 0


def test_each_row_is_rated_by_the_samples_of_all_steps(whole, tmp_path):
    assert main(["passrates", str(whole), "-o", str(tmp_path / "rated.jsonl"), "eval.pass_reward=0.25"]) == 0
    samples = pandas.concat([rollouts.read(whole, step).to_pandas() for step in range(NUM_STEPS)])
    expected = (samples["task_reward"] >= 0.25).groupby(samples["row"]).mean()
    rates = [json.loads(line)["pass_rate"] for line in (tmp_path / "rated.jsonl").read_text().splitlines()]
    assert len(rates) == 40 and rates == [expected.get(row) for row in range(40)]
    assert samples["task_reward"].max() > 0


def test_a_replayed_step_has_the_run_s_numbers(whole):
    for line in metrics(whole):
        found = replay(whole, step=line["step"])
        for name in COMPARED:
            assert found.metrics[name] == pytest.approx(line[name], abs=1e-6), (line["step"], name)


def test_other_options_give_other_numbers(whole):
    found = replay(whole, step=1, options={"algo.name": "dr_grpo", "algo.entropy_coef": 0.5})
    assert found.metrics["actor/adv_std"] < found.run["actor/adv_std"] / 2  # it doesn't divide by the deviation
    assert found.metrics["reward/mean"] == found.run["reward/mean"]
    assert found.metrics["actor/loss"] < -0.4 * found.run["actor/entropy"]


def test_rewards_are_computed_again(whole):
    again = replay(whole, step=2, score=True)
    assert again.metrics["reward/digits"] == pytest.approx(again.run["reward/digits"])
    other = replay(whole, step=2, options={"reward.functions": ["numeric"]})
    assert "reward/numeric" in other.metrics and "reward/digits" not in other.metrics


def test_what_the_run_has_not_kept_is_told(whole, capsys):
    with pytest.raises(UserError, match=r"algo\.beta=0\.1.*no log-probs of a reference"):
        replay(whole, step=0, options={"algo.beta": 0.1})
    with pytest.raises(UserError, match=r"rollout\.temperature: what was sampled stays as it is"):
        replay(whole, step=0, options={"rollout.temperature": 2.0})
    with pytest.raises(UserError, match=r"algo\.name=ppo: its advantages need a critic"):
        replay(whole, step=0, options={"algo.name": "ppo"})
    with pytest.raises(UserError, match="no rollouts of step 99 are kept; it has steps 0 to 11, 12 of them"):
        replay(whole, step=99)
    assert main(["replay", str(whole), "--step", "1", "--gradient"]) == 0
    shown = capsys.readouterr().out
    assert "train/grad_norm is not replayed: no checkpoint is right before step 1" in shown


def test_the_gradient_of_the_first_step(whole):
    """Two ranks made it, one replays it."""
    found = replay(whole, step=0, gradient=True)
    assert found.metrics["train/grad_norm"] == pytest.approx(found.run["train/grad_norm"], rel=1e-5)
