"""pass@k and maj@k against all subsets; intervals against what they promise."""

import itertools
import math

import numpy as np
import pytest

from flux_ray.observability.estimates import interval, ks, majority_at_k, pass_at_k
from flux_ray.observability.eval_metrics import EvaluatedPrompt, answer_of, by_prompt, eval_metrics
from flux_ray.records import Prompt, ScoredGroup

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations(range(n), k))
        share = sum(any(i < right for i in subset) for subset in subsets) / len(subsets)
        assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12), (n, right, k)


def test_pass_at_k_of_many_samples_is_exact():
    exact = 1 - math.comb(9_000, 100) / math.comb(10_000, 100)
    assert pass_at_k(10_000, 1_000, 100) == pytest.approx(exact, rel=1e-9)


def test_a_majority_is_voted_over_subsets_and_a_tie_is_shared():
    assert majority_at_k(["4", "4", "5"], [True, True, False], 3) == 1.0
    assert majority_at_k(["4", "5", "5"], [True, False, False], 3) == 0.0
    assert majority_at_k(["4", "5", "6"], [True, False, False], 3) == pytest.approx(1 / 3)
    assert majority_at_k(["4", "4", "5", "5"], [True, True, False, False], 4) == 0.5
    # Subsets of two of (4, 4, 5): 44 is right, 45 twice is a tie.
    assert majority_at_k(["4", "4", "5"], [True, True, False], 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert majority_at_k(["4", "4"], [True, False], 2) == 0.5, "one answer, scored in two ways"


def test_the_majority_of_one_is_the_mean():
    right = [True, False, False, True, True]
    assert majority_at_k(list("abcde"), right, 1) == pytest.approx(0.6) == pass_at_k(5, 3, 1)


def test_drawn_subsets_come_near_all_of_them_and_repeat():
    answers, right = ["4"] * 9 + ["5"] * 11, [True] * 9 + [False] * 11
    # 3 of 20: at least two of the nine fours.
    exact = (math.comb(9, 2) * 11 + math.comb(9, 3)) / math.comb(20, 3)
    found = majority_at_k(answers, right, 3)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 500))
    assert found == majority_at_k(answers, right, 3)


def test_ks_end_with_all_samples():
    assert ks(1) == [1] and ks(2) == [1, 2] and ks(10) == [1, 2, 4, 8, 10]


def test_an_interval_covers_the_mean_as_often_as_it_says():
    """200 experiments of 60 prompts, right with p = 0.3: 95 % of 200, less what 60 prompts miss it by."""
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        low, high = interval((random.random(60) < 0.3).astype(float))
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_an_interval_is_that_of_the_normal_law_where_there_are_many():
    values = np.random.default_rng(2).normal(5.0, 2.0, 5_000)
    low, high = interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert interval([0.25]) == (0.25, 0.25) and interval(values) == (low, high)


def test_a_paired_interval_is_narrower_where_prompts_differ_more_than_models():
    random = np.random.default_rng(3)
    hard = random.random(100)
    ours, theirs = hard + 0.05 + random.normal(0, 0.01, 100), hard
    low, high = interval(ours - theirs)
    assert 0.04 < low < high < 0.06 and np.diff(interval(ours))[0] > 5 * (high - low)


def evaluated(row, texts, rewards, data_set=""):
    rewards = np.array(rewards, np.float64)
    counts = np.ones(len(rewards), np.int64)
    scored = ScoredGroup(row, rewards, rewards, {"numeric": rewards}, counts, counts, counts > 1, 0)
    return EvaluatedPrompt(Prompt(row, row, "q", np.array([1], np.int32), {}, len(rewards), 0, data_set), tuple(texts),
                           scored)


def test_the_metrics_of_prompts_leave_unscored_samples_out():
    everyone = [evaluated(0, ["4", "4.0", "5", "6"], [1, 1, 0, 0]),
                evaluated(1, ["1", "2", "3", "3"], [np.nan, np.nan, 1, 0])]
    values = by_prompt(everyone, pass_reward=1.0)
    assert values["mean"] == [0.5, 0.5] and values["numeric"] == [0.5, 0.5]
    assert values["pass@2"] == [pytest.approx(5 / 6), 1.0] and values["maj@4"][0] == 1.0
    assert np.isnan(values["pass@4"][1]), "two of its samples have no reward"
    metrics = eval_metrics(values, "eval")
    assert metrics["eval/pass@4"] == 1.0 and metrics["eval/task_mean_low"] == metrics["eval/mean_high"] == 0.5
    assert "eval/mean" not in metrics, "that is told of already"


def test_one_sample_a_prompt_has_intervals_alone():
    metrics = eval_metrics(by_prompt([evaluated(i, ["x"], [i % 2]) for i in range(10)], pass_reward=1.0), "eval/a")
    assert set(metrics) == {f"eval/a/{name}_{end}" for name in ("mean", "task_mean", "numeric")
                            for end in ("low", "high")}
    assert metrics["eval/a/mean_low"] < 0.5 < metrics["eval/a/mean_high"]


def test_what_is_right_begins_at_a_level():
    everyone = [evaluated(0, ["a", "b"], [0.5, 0.2])]
    assert by_prompt(everyone, pass_reward=0.5)["pass@1"] == [0.5]
    assert by_prompt(everyone, pass_reward=1.0)["pass@1"] == [0.0]
    almost = [evaluated(0, ["a", "b"], [0.1 + 0.2, 0.0])]
    assert by_prompt(almost, pass_reward=0.3)["pass@1"] == [0.5]


def test_two_ways_to_write_an_answer_count_as_one():
    assert answer_of("It is 1,000.") == answer_of(r"\boxed{1000}") == "1000"
    assert answer_of(" yes\n") == answer_of("yes")
