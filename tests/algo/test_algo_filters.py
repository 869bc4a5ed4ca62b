"""Which groups are dropped, and why."""

from __future__ import annotations

import numpy as np
import pytest

from flux_ray.algo.filters import check_filter, refusal
from flux_ray.config import KeptConfig, from_dict, preset
from flux_ray.errors import UserError
from flux_ray.records import ScoredGroup

pytestmark = pytest.mark.unit
nan = float("nan")


def group(task, *, rewards=None, **parts) -> ScoredGroup:
    size = len(task)
    return ScoredGroup(
        uid=1, rewards=np.array(rewards or task, float), task_rewards=np.array(task, float),
        parts={name: np.array(values, float) for name, values in parts.items()}, num_tokens=np.full(size, 9),
        num_loss_tokens=np.full(size, 3), truncated=np.zeros(size, bool), oldest_version=0,
    )


@pytest.mark.parametrize(("scored", "reward", "cause"), [
    (group([1, 1, 1], rewards=[1, 0.5, 1]), "task", "same_reward"),   # a length penalty tells nothing of the task
    (group([1, 0, 1], rewards=[1, 1, 1]), "task", None),
    (group([1, nan, 1]), "task", "same_reward"),
    (group([1, nan, 0]), "task", None),
    (group([nan, nan]), "task", "unscored"),
    (group([1, 0], right=[1, 1], form=[0, 1]), "right", "same_reward"),
    (group([1, 1], right=[1, 1], form=[0, 1]), "form", None),
    (group([nan, nan], mine=[nan, nan]), "mine/format", "unscored"),  # it had nothing to say of this group
    (group([1, 1]), None, None),
    (group([nan, nan]), None, "unscored"),
    (group([1, nan]), None, None),
])
def test_refusal(scored, reward, cause):
    assert refusal(scored, KeptConfig(reward=reward)) == cause


def test_a_part_that_is_not_there():
    with pytest.raises(UserError, match=r"filter\.reward: unknown reward 'rihgt': did you mean 'right'"):
        refusal(group([1, 0], right=[1, 0]), KeptConfig(reward="rihgt"))


def test_checked_at_start():
    check_filter(from_dict(preset("dapo")), ["numeric"])
    check_filter(from_dict({"filter.reward": "mine/format"}), ["mine"])
    check_filter(from_dict({"rollout.group_size": 1}), [])
    check_filter(from_dict({"filter.oversample": 0.5, "reward.on_failure": "drop"}), [])
    with pytest.raises(UserError, match=r"filter\.oversample=0\.5 draws prompts .* without filter\.reward"):
        check_filter(from_dict({"filter.oversample": 0.5}), [])
    with pytest.raises(UserError, match=r"rollout\.group_size must be >= 2, got 1"):
        check_filter(from_dict({"filter.reward": "task", "rollout.group_size": 1}), ["numeric"])
    with pytest.raises(UserError, match=r"unknown reward 'numreic': did you mean 'numeric'\? \(known: numeric, task\)"):
        check_filter(from_dict({"filter.reward": "numreic"}), ["numeric"])
