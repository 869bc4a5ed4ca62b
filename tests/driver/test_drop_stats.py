"""The counts of dropped groups, and when they stop a run."""

from __future__ import annotations

import pytest

from flux_ray.config import from_dict
from flux_ray.driver.drop_stats import DropStats

pytestmark = pytest.mark.unit


def drops(max_batches: int = 3, batch: int = 4, total: int = 0) -> DropStats:
    """Of groups of four samples."""
    return DropStats(from_dict({"filter.max_batches": max_batches, "batch.prompts_per_step": batch,
                                "rollout.group_size": 4}), total=total)


def drop(counted: DropStats, cause: str, times: int = 1, num_tokens: int = 8) -> None:
    for _ in range(times):
        counted.dropped(cause, num_tokens=num_tokens)


def test_counts_are_those_of_the_step_and_the_total_goes_on():
    counted = drops(total=5)
    drop(counted, "same_reward", 2)
    drop(counted, "reward_failed", num_tokens=20)
    counted.kept(num_tokens=44)
    counted.surplus(3)
    assert counted.step_metrics() == {
        "filter/dropped_same_reward": 2.0, "filter/dropped_unscored": 0.0, "filter/dropped_reward_failed": 1.0,
        "filter/dropped_rollout_failed": 0.0, "filter/rate_rollout_failed": 0.0,
        "filter/rate_same_reward": 0.5, "filter/rate_unscored": 0.0, "filter/rate_reward_failed": 0.25,
        "filter/length_same_reward": 2.0, "filter/length_reward_failed": 5.0, "filter/length_trained": 11.0,
        "filter/length_issued": 5.0, "filter/acceptance_rate": 0.25, "filter/surplus": 3.0,
        "filter/surplus_accepted": 0.0,
        "driver/groups_dropped": 8.0,
    }
    after = counted.step_metrics()
    assert after["filter/acceptance_rate"] == 1.0 and after["filter/surplus"] == 0 and counted.total == 8
    assert not any(name.startswith("filter/length") for name in after)


def test_the_limit_names_the_acceptance_rate_and_the_causes():
    counted = drops(max_batches=3, batch=4)
    counted.kept(num_tokens=4)
    drop(counted, "same_reward", 8)   # with the 4 that a step needs: 12 of 3 batches
    with pytest.raises(RuntimeError, match=r"9 of 10 groups .*same_reward 8, unscored 1.*rate 10\.0%; filter\.max_ba"):
        drop(counted, "unscored")


def test_the_limit_grows_with_what_is_kept_for_later_steps():
    """With max_staleness=4 the groups of five steps are drawn while the first one is trained on."""
    counted = drops(max_batches=3, batch=4)
    for _ in range(20):
        counted.kept(num_tokens=4)
    drop(counted, "same_reward", 40)
    with pytest.raises(RuntimeError, match=r"41 of 61 groups"):
        drop(counted, "same_reward")


def test_the_limit_is_a_steps_and_surplus_is_no_part_of_it():
    counted = drops(max_batches=2, batch=4)
    for _ in range(5):
        drop(counted, "same_reward", 4)
        counted.surplus(100)
        counted.step_metrics()
    assert counted.total == 20


def test_spares_whose_turn_has_not_come_dont_stop_a_run():
    counted = drops(total=0)
    for _ in range(1000):
        counted.dropped("same_reward", num_tokens=4, spent=0)
    with pytest.raises(RuntimeError, match=r"acceptance rate 0\.0%"):
        counted.dropped("same_reward", num_tokens=4, spent=1000)


def test_what_was_accepted_and_is_superfluous_is_not_told_as_trained_on():
    counted = drops(total=0)
    drop(counted, "same_reward", num_tokens=4)
    for num_tokens in (40, 80):
        counted.kept(num_tokens=num_tokens)
    counted.surplus(2, [80])
    metrics = counted.step_metrics()
    assert (metrics["filter/surplus"], metrics["filter/surplus_accepted"]) == (2.0, 1.0)
    assert (metrics["filter/length_trained"], metrics["filter/length_surplus"]) == (10.0, 20.0)
    assert metrics["filter/acceptance_rate"] == 2 / 3, "a filter let both through"


def test_a_group_that_was_kept_and_starts_again_is_counted_once():
    """As where its rollout worker died before it was trained on: it may become another length the next time."""
    counted = drops()
    drop(counted, "same_reward", num_tokens=8)
    counted.kept(num_tokens=40)
    counted.kept(num_tokens=40, sign=-1)
    counted.kept(num_tokens=48)
    metrics = counted.step_metrics()
    assert metrics["filter/acceptance_rate"] == 0.5
    assert (metrics["filter/length_trained"], metrics["filter/length_issued"]) == (12.0, 7.0)


def test_of_a_group_that_is_not_kept_any_more_no_length_is_told():
    counted = drops()
    counted.kept(num_tokens=40)
    counted.kept(num_tokens=40, sign=-1)
    metrics = counted.step_metrics()
    assert metrics["filter/acceptance_rate"] == 1.0
    assert not any(name.startswith("filter/length") for name in metrics)
