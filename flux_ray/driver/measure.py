"""The metrics of a batch that the driver can compute from small records.

Takes:  the groups of a step (rewards, lengths, times) and their versions.
Gives:  reward/*, rollout/*, driver/staleness_*: floats by name.
Never:  looks at a token.
"""

from __future__ import annotations

import numpy as np

from flux_ray.driver.entry import Entry
from flux_ray.driver.versions import Versions
from flux_ray.observability.reward_metrics import length_metrics, reward_metrics


def _all_alike(rewards_G: np.ndarray) -> bool:
    """Whether a group teaches nothing: all its samples that have a reward have the same one."""
    given = rewards_G[~np.isnan(rewards_G)]
    return not len(given) or bool(np.ptp(given) == 0)


def batch_metrics(batch: list[Entry], step: int, versions: Versions) -> dict[str, float]:
    """The metrics of one step.

    rollout/s: from the first request to the last answer; group_s: mean of a group; spanning_frac: share of the samples
    that went on after new weights had come; staleness: how many steps the oldest token of a group is behind.
    """
    ready = [entry.ready for entry in batch]
    groups = [news.scored for news in ready]
    staleness = versions.staleness(step, [group.oldest_version for group in groups])
    seconds = max(entry.end_s for entry in batch) - min(entry.start_s for entry in batch)
    tokens = sum(entry.num_tokens for entry in batch)
    same = [group for group in groups if _all_alike(group.rewards)]
    return (
        reward_metrics(groups, "reward")
        | length_metrics(groups, "rollout")
        | {
            "reward/same_frac": len(same) / len(groups),
            "rollout/s": seconds,
            "reward/group_s": float(np.mean([news.score_s for news in ready])),
            "reference/group_s": float(np.mean([news.reference_s for news in ready])),
            "rollout/tokens": float(tokens),
            "rollout/spanning_frac": sum(news.num_spanning for news in ready) / sum(len(g.rewards) for g in groups),
            "rollout/tokens_per_s": tokens / seconds,
            "driver/staleness_mean": float(np.mean(staleness)) if staleness else 0.0,
            "driver/staleness_max": float(max(staleness, default=0)),
        }
    )
