"""What an evaluation says beyond the mean: pass@k, the vote, intervals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from flux_ray.observability.eval_metrics import interval, majority, paired_interval, pass_at, sample_metrics
from flux_ray.records import ScoredGroup

pytestmark = pytest.mark.unit


def group(uid: int, rewards: list[float]) -> ScoredGroup:
    values, ones = np.array(rewards), np.ones(len(rewards), int)
    return ScoredGroup(uid, values, values, {}, ones, ones, ones < 0, 0)


@pytest.mark.parametrize("num_samples", [1, 2, 5, 6])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_have_a_correct_one(num_samples):
    for num_correct in range(num_samples + 1):
        correct = [i < num_correct for i in range(num_samples)]
        for k in range(1, num_samples + 1):
            chosen = list(itertools.combinations(correct, k))
            assert pass_at(k, num_samples, num_correct) == pytest.approx(sum(map(any, chosen)) / len(chosen))


@pytest.mark.parametrize(("texts", "winner"), [
    (["3", "4", "4.0", "3"], 0),                                   # a tie: who came first
    (["the answer is 4", r"\boxed{4}", "#### 5"], 0),
    ([r"\boxed{x+1}", r"\boxed{ x+1 }", r"\boxed{x}"], 0),
    (["", "7", ""], 1),                                            # no answer is no vote
    (["", ""], None),
    ([r"\frac{1}{2}", "0.5", "2"], 0),
])
def test_the_vote(texts, winner):
    assert majority(texts) == winner


def test_metrics_of_samples():
    groups = [group(0, [1, 0, 0, 1, 0]), group(1, [0, 0, 0, 0, 0]), group(2, [0.9, math.nan, 1, 1, 1])]
    texts = [["1", "2", "3", "1", "4"], ["5"] * 5, ["6", "", "7", "7", "7"]]
    metrics = sample_metrics(groups, texts, "eval", correct_at=1.0)
    assert {name for name in metrics if "@" in name} == {
        "eval/pass@1", "eval/pass@2", "eval/pass@4", "eval/pass@5", "eval/maj@4", "eval/maj@5"}
    assert metrics["eval/pass@1"] == pytest.approx((2 / 5 + 0 + 3 / 5) / 3)
    assert metrics["eval/pass@5"] == pytest.approx(2 / 3)
    assert metrics["eval/maj@5"] == pytest.approx(2 / 3), "1 won over 2, 3, 4; 7 over 6"
    low, high = metrics["eval/task_mean_low"], metrics["eval/task_mean_high"]
    assert low < np.mean([0.4, 0.0, 3.9 / 4]) < high
    assert sample_metrics([group(0, [1])], [["1"]], "eval", correct_at=1.0) == {}, "of one prompt there is no interval"
    assert "eval/pass@1" not in sample_metrics([group(0, [1]), group(1, [0])], [["1"]] * 2, "eval", correct_at=1.0)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """95 % of 400 samples of 100 prompts: within three standard errors of it."""
    chance = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        low, high = interval((chance.random(100) < 0.3).astype(float))
        covered += low <= 0.3 <= high
    assert abs(covered / 400 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 400) + 0.01


def test_what_two_models_share_by_prompt_makes_no_interval_wider():
    hard = np.random.default_rng(1).random(200)
    low, high = paired_interval(hard, hard + 0.1)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
