"""The counts of dropped groups, and when they stop a run."""

from __future__ import annotations

import pytest

from flux_ray.config import from_dict
from flux_ray.driver.drops import Drops

pytestmark = pytest.mark.unit


def drops(max_batches: int = 3, batch: int = 4, total: int = 0) -> Drops:
    return Drops(from_dict({"filter.max_batches": max_batches, "batch.prompts_per_step": batch}), total=total)


def test_counts_are_those_of_the_step_and_the_total_goes_on():
    counted = drops(total=5)
    for cause in ("same_reward", "same_reward", "reward_failed"):
        counted.dropped(cause)
    counted.kept()
    assert counted.step_metrics() == {
        "filter/dropped_same_reward": 2.0, "filter/dropped_unscored": 0.0, "filter/dropped_reward_failed": 1.0,
        "filter/acceptance_rate": 0.25, "driver/groups_dropped": 8.0,
    }
    assert counted.step_metrics()["filter/acceptance_rate"] == 1.0 and counted.total == 8


def test_the_limit_names_the_acceptance_rate_and_the_causes():
    counted = drops(max_batches=3, batch=4)
    counted.kept()
    for _ in range(8):
        counted.dropped("same_reward")   # with the 4 that a step needs: 12 of 3 batches
    with pytest.raises(RuntimeError, match=r"9 of 10 groups .*same_reward 8, unscored 1.*rate 10\.0%; filter\.max_ba"):
        counted.dropped("unscored")


def test_the_limit_is_a_steps():
    counted = drops(max_batches=2, batch=4)
    for _ in range(5):
        for _ in range(4):
            counted.dropped("same_reward")
        counted.step_metrics()
    assert counted.total == 20
