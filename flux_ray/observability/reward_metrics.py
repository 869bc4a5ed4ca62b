"""The metrics of groups that their scores alone tell.

Takes:  ScoredGroups.
Gives:  rewards and lengths, floats by name; METRICS and LENGTHS: what each is.
Never:  looks at a token.
"""

from __future__ import annotations

import numpy as np

from flux_ray.observability.described import Described, Range
from flux_ray.records import FAILED, ScoredGroup

SAMPLES = "samples that have a reward"

#: Evaluations have the same after eval/.
METRICS = (
    Described("reward/mean", "mean of the rewards that are learned from: weights, `overlong` and shaping included",
              "reward", SAMPLES, "rises",
              "flat over many steps: look at `reward/same_frac` and `samples.jsonl`. Rises while `reward/task_mean` "
              "doesn't: shaping is what is learned, so lessen its weight"),
    Described("reward/std", "population standard deviation (ddof 0) of the same", "reward", SAMPLES, "above 0",
              "as `reward/same_frac`"),
    Described("reward/task_mean", "the mean without functions that only shape (`length`, `repetition`, those "
              "registered with `shaping=True`)", "reward", SAMPLES, "rises",
              "at 0: is the answer cut (`rollout/truncated_frac`)? Is its form what the reward reads?"),
    Described("reward/NAME", "mean of one function before its weight. A reward model's NAME is its run's folder",
              "reward", SAMPLES, "",
              "one alone rises: change `reward.weights`, or `reward.combine=each`"),
    Described("reward/NAME/PART", "mean of a part that a function gave or logged", "reward", SAMPLES),
    Described("reward/overlong", "mean of the soft penalty on length (`reward.overlong_penalty`)", "reward", SAMPLES,
              "near 0", "far below: answers outgrow `rollout.max_tokens`. Give more, or a larger "
              "`reward.overlong_tokens`"),
    Described("reward/errors", "samples whose reward failed, and that left their group (`reward.on_failure=drop`)",
              "sample", "all samples", "0", "the reward workers' logs name each"),
    Described("reward/invalid", "samples for which no function gave a value (`None` or `NaN`)", "sample", "all samples",
              "0", "grows: the policy writes what the reward can't read"),
)

LENGTHS = (
    Described("rollout/response_length_mean", "mean of the sampled tokens of a response", "token", "responses", "",
              "grows without `reward/task_mean`: a reward pays for length. Set `reward.overlong_penalty`, or take "
              "`algo=dr_grpo`"),
    Described("rollout/response_length_max", "sampled tokens of the longest response", "token", "responses"),
    Described("rollout/truncated_frac", "share of responses that the limit cut (`rollout.max_tokens`, or the context)",
              "1", "responses", Range(high=0.5), "raise `rollout.max_tokens`, or set `algo.mask_truncated=true`"),
)


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
