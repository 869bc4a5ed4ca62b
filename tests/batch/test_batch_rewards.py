"""Several rewards: summed first, or each normalised alone and then weighted."""

from __future__ import annotations

import numpy as np
import pytest

from flux_ray.batch import estimated
from flux_ray.config import RewardConfig
from flux_ray.records import ScoredGroup

pytestmark = pytest.mark.unit
nan = float("nan")


def scored(rewards, **parts) -> ScoredGroup:
    size = len(rewards)
    return ScoredGroup(
        uid=1, rewards=np.array(rewards, float), task_rewards=np.array(rewards, float),
        parts={name: np.array(values, float) for name, values in parts.items()}, num_tokens=np.full(size, 9),
        num_loss_tokens=np.full(size, 3), truncated=np.zeros(size, bool), oldest_version=0,
    )


def each(functions, weights=()):
    return RewardConfig(functions=list(functions), weights=list(weights), combine="each")


def test_summed_first_is_the_group_as_it_is():
    group = scored([3, 1], a=[3, 1])
    assert estimated(group, RewardConfig(functions=["a"])) is group


def test_each_alone_then_weighted():
    """A reward of great spread doesn't drown another: after the division each counts by its weight alone."""
    a, b = [100.0, 0, 0, 100], [1.0, 2, 3, 4]
    group = scored([101, 2, 3, 104], a=a, b=b, seen=[9, 9, 9, 9])
    result = estimated(group, each(["a", "path/to/my.py:b"], [2.0, 1.0]))
    z = lambda x: (np.array(x) - np.mean(x)) / (np.std(x, ddof=1) + 1e-6)  # noqa: E731
    np.testing.assert_allclose(result.rewards, 2 * z(a) + z(b), rtol=1e-12)
    assert result.task_rewards is group.task_rewards and result.parts is group.parts


def test_a_part_without_spread_and_samples_without_a_score():
    group = scored([1, 2, nan, 1], a=[1, 1, nan, 1], b=[nan, 1, nan, 0])
    result = estimated(group, each(["a", "b"]))
    half = 0.5 / (np.sqrt(0.5) + 1e-6)
    np.testing.assert_allclose(result.rewards, [0, half, nan, -half])


def test_the_penalty_on_length_is_not_blown_up():
    group = scored([1, 0.9], a=[1, 1], overlong=[0, -0.1])
    np.testing.assert_allclose(estimated(group, each(["a"])).rewards, [0, -0.1])
