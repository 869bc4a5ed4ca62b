"""The metrics of groups that their scores alone tell.

Takes:  ScoredGroups.
Gives:  rewards and lengths, floats by name.
Never:  looks at a token.
"""

from __future__ import annotations

import numpy as np

from flux_ray.records import FAILED, ScoredGroup


def reward_metrics(groups: list[ScoredGroup], prefix: str) -> dict[str, float]:
    """Mean and standard deviation (ddof 0) of the rewards over samples, their mean without shaping (task_mean), and
    the mean of each part; unscored samples left out. `errors` and `invalid` count these: those whose reward failed,
    and those that no function had a value for.
    """
    means = {name: _given([group.parts[name] for group in groups if name in group.parts])
             for name in sorted({name for group in groups for name in group.parts} - {FAILED})}
    means["task_mean"] = _given([group.task_rewards for group in groups])  # whatever a part is called
    metrics = {f"{prefix}/{name}": float(values.mean()) for name, values in means.items() if len(values)}
    rewards = _given([group.rewards for group in groups])
    if len(rewards):
        metrics |= {f"{prefix}/mean": float(rewards.mean()), f"{prefix}/std": float(rewards.std())}
    failed = sum(float(group.parts[FAILED].sum()) for group in groups if FAILED in group.parts)
    unscored = sum(int(np.isnan(group.rewards).sum()) for group in groups)
    return metrics | {f"{prefix}/errors": failed, f"{prefix}/invalid": unscored - failed}


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
