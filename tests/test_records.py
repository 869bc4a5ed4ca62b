"""Records that travel between processes: what arrives is what was sent."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from flux_ray.records import Completion, Prompt, RolloutGroup, Sampled, ScoredGroup, Trajectory

pytestmark = pytest.mark.unit


def sent_on(record: Any) -> Any:
    return pickle.loads(pickle.dumps(record, 5))  # noqa: S301 - our own


def experts(num_tokens: int) -> np.ndarray:
    return np.arange(num_tokens * 6, dtype=np.uint8).reshape(num_tokens, 3, 2)


def trajectory(length: int, reason: str) -> Trajectory:
    mask = np.arange(length) >= 2
    return Trajectory(np.arange(length, dtype=np.int32), mask, np.linspace(-1, 0, length, dtype=np.float32) * mask,
                      np.where(mask, 7, -1).astype(np.int32), 2, reason, None if length == 2 else experts(length - 1))


def assert_same(sent, arrived, names):
    for name in names:
        one, other = getattr(sent, name), getattr(arrived, name)
        if isinstance(one, np.ndarray):
            assert one.dtype == other.dtype and one.tolist() == other.tolist(), name
        else:
            assert one == other, name


def test_a_group_arrives_with_every_trajectory_as_it_was():
    prompt = Prompt(3, 3, "2 + 2 =", np.array([0, 1], np.int32), {"answer": "4"}, 3, 17)
    sent = RolloutGroup(prompt, (trajectory(5, "stop"), trajectory(2, "length"), trajectory(9, "stop")))
    arrived = sent_on(sent)
    assert (arrived.prompt.uid, arrived.prompt.columns) == (3, {"answer": "4"})
    assert len(arrived.trajectories) == 3
    for one, other in zip(sent.trajectories, arrived.trajectories, strict=True):
        assert_same(one, other, Trajectory.__dataclass_fields__)


@pytest.mark.parametrize("lengths", [(), (3,), (0, 4, 1)])
def test_samples_arrive_as_they_were(lengths):
    completions = tuple(Completion(np.arange(n, dtype=np.int32), np.full(n, -0.5, np.float32), np.full(n, 7, np.int32),
                                   "stop" if n else "length", experts(n + 1) if n != 1 else None) for n in lengths)
    arrived = sent_on(Sampled(completions, 7))
    assert arrived.step == 7 and len(arrived.completions) == len(lengths)
    for one, other in zip(completions, arrived.completions, strict=True):
        assert_same(one, other, Completion.__dataclass_fields__)


def test_scores_arrive_with_what_nobody_scored():
    sent = ScoredGroup(17, np.array([1.0, np.nan]), np.array([1.0, 0.0]), {"made": np.array([np.nan, 0.0])},
                       np.array([9, 8]), np.array([3, 2]), np.array([False, True]), 7)
    arrived = sent_on(sent)
    assert (arrived.uid, arrived.oldest_version, list(arrived.parts)) == (17, 7, ["made"])
    for name in ("rewards", "task_rewards", "num_tokens", "num_loss_tokens", "truncated"):
        np.testing.assert_array_equal(getattr(sent, name), getattr(arrived, name))
    np.testing.assert_array_equal(sent.parts["made"], arrived.parts["made"])
