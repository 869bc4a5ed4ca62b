"""The filter: which groups are worth training on.

Takes:  a ScoredGroup, the section `filter`.
Gives:  `refusal`: the cause for which a group is dropped, or None; `check_filter` for the start of a run.
Knows:  a group whose samples are all rewarded alike has no advantage: it would only dilute the batch (2503.14476). One
        without any reward is always dropped.
Never:  sees a token; counts (the driver does).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from flux_ray.config import KeptConfig, PolicyGradientConfig
from flux_ray.errors import UserError, unknown
from flux_ray.records import ScoredGroup

SAME_REWARD, UNSCORED = "same_reward", "unscored"
CAUSES = (SAME_REWARD, UNSCORED)  # why the filter refuses
REWARD_FAILED = "reward_failed"  # another cause: rewards failed, and too few are left; with reward.on_failure=drop
ROLLOUT_FAILED = "rollout_failed"  # another: a user's rollout function ended its process, or hung, twice
TASK = "task"  # the value of filter.reward for the task reward: all functions but shaping


def refusal(scored: ScoredGroup, config: KeptConfig) -> str | None:
    """Why this group is dropped: SAME_REWARD, or UNSCORED where no sample has the reward; None: it is kept.

    >>> group = ScoredGroup(uid=1, rewards=np.array([1., .9]), task_rewards=np.array([1., 1.]), parts={},
    ...                     num_tokens=np.array([9, 8]), num_loss_tokens=np.array([3, 2]),
    ...                     truncated=np.array([False, False]), oldest_version=7)
    >>> refusal(group, KeptConfig(reward="task"))
    'same_reward'
    """
    if np.isnan(scored.rewards).all():
        return UNSCORED
    if config.reward is None:
        return None
    if config.reward != TASK and config.reward not in scored.parts:
        if "/" in config.reward and config.reward.partition("/")[0] in scored.parts:
            return UNSCORED  # the function gave no such part of this group
        raise UserError(f"filter.reward: {unknown('reward', config.reward, {TASK, *scored.parts})}")
    rewards_G = scored.task_rewards if config.reward == TASK else scored.parts[config.reward]
    given = rewards_G[~np.isnan(rewards_G)]
    if not len(given):
        return UNSCORED
    return SAME_REWARD if np.ptp(given) == 0 else None


def check_filter(config: PolicyGradientConfig, functions: Collection[str]) -> None:
    """UserError where the filter could never keep or drop a group, or reads a reward that no function gives."""
    name, group_size = config.filter.reward, config.rollout.group_size
    if name is None:
        if config.filter.oversample and config.reward.on_failure == "stop":
            raise UserError(f"filter.oversample={config.filter.oversample:g} draws prompts in the place of dropped "
                            "groups: without filter.reward (or reward.on_failure=drop) none is dropped")
        return
    if group_size < 2:
        raise UserError(f"filter.reward={name} compares the samples of a group: rollout.group_size must be >= 2, "
                        f"got {group_size}")
    if name != TASK and name.partition("/")[0] not in functions:   # NAME/PART: which parts there are shows later
        raise UserError(f"filter.reward: {unknown('reward', name, {TASK, *functions})}")
