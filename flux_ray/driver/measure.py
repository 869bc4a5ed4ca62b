"""The metrics of a batch that the driver can know: from small records alone.

Takes:  the groups of a step (rewards, lengths, times), the trainer's version.
Gives:  reward/*, rollout/*, driver/staleness_*: floats by name.
Never:  looks at a token.
"""

from __future__ import annotations

import numpy as np

from flux_ray.driver.rooms import ReadyGroup
from flux_ray.records import ScoredGroup


def reward_metrics(groups: list[ScoredGroup], prefix: str) -> dict[str, float]:
    """Mean and standard deviation (ddof 0) of the rewards over samples, their mean without shaping (task_mean), and
    the mean of each part; unscored samples left out.
    """
    means = {name: _given([group.parts[name] for group in groups if name in group.parts])
             for name in sorted({name for group in groups for name in group.parts})}
    means["task_mean"] = _given([group.task_rewards for group in groups])  # whatever a part is called
    metrics = {f"{prefix}/{name}": float(values.mean()) for name, values in means.items() if len(values)}
    rewards = _given([group.rewards for group in groups])
    if len(rewards):
        metrics |= {f"{prefix}/mean": float(rewards.mean()), f"{prefix}/std": float(rewards.std())}
    return metrics


def _all_alike(rewards_G: np.ndarray) -> bool:
    """Whether a group teaches nothing: those of its samples that have a reward have the same."""
    given = rewards_G[~np.isnan(rewards_G)]
    return not len(given) or bool(np.ptp(given) == 0)


def _given(values: list[np.ndarray]) -> np.ndarray:
    """All of them but nan, in a row."""
    joined = np.concatenate(values)
    return joined[~np.isnan(joined)]


def length_metrics(groups: list[ScoredGroup], prefix: str) -> dict[str, float]:
    """Sampled tokens of a response (mean, largest) and the share of responses that the limit cut."""
    lengths = np.concatenate([group.num_loss_tokens for group in groups])
    truncated = np.concatenate([group.truncated for group in groups])
    return {
        f"{prefix}/response_length_mean": float(lengths.mean()),
        f"{prefix}/response_length_max": float(lengths.max()),
        f"{prefix}/truncated_frac": float(truncated.mean()),
    }


def batch_metrics(batch: list[ReadyGroup], *, version: int) -> dict[str, float]:
    """All of them for one step. rollout/s: from the first request to the last answer; group_s: mean of a group;
    spanning_frac: share of the samples that went on after new weights had come.
    """
    groups = [group.scored for group in batch]
    rolled = [group.rolled for group in batch]
    seconds = max(r.end_s for r in rolled) - min(r.start_s for r in rolled)
    tokens = sum(r.num_tokens for r in rolled)
    staleness = [version - group.oldest_version for group in groups if group.oldest_version >= 0]
    same = [group for group in groups if _all_alike(group.rewards)]
    return (
        reward_metrics(groups, "reward")
        | length_metrics(groups, "rollout")
        | {
            "reward/same_frac": len(same) / len(groups),
            "rollout/s": seconds,
            "reward/group_s": float(np.mean([group.score_s for group in batch])),
            "reference/group_s": float(np.mean([group.reference_s for group in batch])),
            "rollout/tokens": float(tokens),
            "rollout/spanning_frac": sum(r.num_spanning for r in rolled) / sum(len(group.rewards) for group in groups),
            "rollout/tokens_per_s": tokens / seconds,
            "driver/staleness_mean": float(np.mean(staleness)) if staleness else 0.0,
            "driver/staleness_max": float(max(staleness, default=0)),
        }
    )
