"""What the estimator sees of a group's rewards.

Takes:  a ScoredGroup, the config of the rewards.
Gives:  `estimated`: the group with the rewards that advantages are made from.
Knows:  the group holds the sum already (reward.combine=sum). Rewards that are normalised one by one (each) are made
        here, so that metrics, filters and evaluations still see those that were given.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flux_ray.config import RewardConfig
from flux_ray.names import reward_name
from flux_ray.records import OVERLONG, ScoredGroup

EPS_STD = 1e-6  # in the reward's unit, added to a standard deviation that divides: far below any reward's resolution


def estimated(scored: ScoredGroup, config: RewardConfig) -> ScoredGroup:
    """The group as it is (reward.combine=sum), or (each) with rewards sum_k w_k (R_k - mean_k) / (std_k + eps).

    Mean and std (ddof 1) are of the samples that function k scored; the soft penalty on length is added as it is. A
    sample that nothing scored stays nan.
    """
    if config.combine == "sum":
        return scored
    names = [reward_name(reference) for reference in config.functions]
    weights = config.weights or [1.0] * len(names)
    parts_FG = np.stack([scored.parts[name] for name in names])
    relative_FG = np.stack([_relative(part_G) for part_G in parts_FG])
    total_G = np.nansum(np.array(weights)[:, None] * relative_FG, axis=0) + scored.parts.get(OVERLONG, 0.0)
    return replace(scored, rewards=np.where(np.isnan(parts_FG).all(axis=0), np.nan, total_G))


def _relative(values_G: np.ndarray) -> np.ndarray:
    """Less the mean, over the standard deviation; 0 where all that are given are equal, nan where none is."""
    given = values_G[~np.isnan(values_G)]
    if len(given) < 2 or np.ptp(given) == 0:
        return np.where(np.isnan(values_G), np.nan, 0.0)
    return (values_G - given.mean()) / (given.std(ddof=1) + EPS_STD)
