"""The metrics of a batch that the driver can compute from small records.

Takes:  the groups of a step (rewards, lengths, times) and their versions.
Gives:  reward/*, rollout/*, driver/staleness_*: floats by name; METRICS: what each is. `group_spans`.
Never:  looks at a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from flux_ray.driver.entry import Entry
from flux_ray.driver.versions import Versions
from flux_ray.observability.described import Described, Range
from flux_ray.observability.reward_metrics import length_metrics, reward_metrics
from flux_ray.observability.spans import GENERATE, Span

GROUPS = "groups of the batch"

METRICS = (
    Described("reward/same_frac", "share of groups whose samples all have the same reward: they teach a group "
              "algorithm nothing", "1", GROUPS, Range(high=0.95),
              "prompts are too easy or too hard: take others, a larger `rollout.group_size`, or `filter.reward=task`"),
    Described("reward/group_s", "mean time of a group's scoring, waiting for a worker included", "s", GROUPS, "",
              "grows: more `reward.num_workers` (a reward model: `reward.model_replicas`)"),
    Described("reference/group_s", "mean time of a group's reference log-probs; 0 without a KL", "s", GROUPS, "",
              "grows: more `reference.num_actors`, or `algo.beta=0`"),
    Described("rollout/tokens", "tokens sampled for the batch", "token", "all engines"),
    Described("rollout/s", "time from the batch's first request to its last answer", "s", "all engines"),
    Described("rollout/tokens_per_s", "their ratio", "token / s", "all engines", "",
              "few: run more sequences at once (`rollout.max_num_seqs`, KV cache), or more engines"),
    Described("rollout/spanning_frac", "share of samples that went on after new weights had come", "1", "samples", "",
              "near 1: updates come faster than answers end. Make fewer updates, or set `algo.off_policy=tis`"),
    Described("driver/staleness_mean", "mean of the steps that a group's oldest token is behind the trainer", "step",
              GROUPS, Range(high=4.0),
              "what is learned from is old: a smaller `driver.max_staleness`, more engines, or `algo.off_policy=tis`"),
    Described("driver/staleness_max", "the most steps that a group's oldest token is behind the trainer",
              "step", GROUPS,
              "≤ `driver.max_staleness`",
              "near the bound: engines lag. A smaller `driver.max_staleness` gives fresher samples"),
)


def _all_alike(rewards_G: np.ndarray) -> bool:
    """Whether a group teaches nothing: all its samples that have a reward have the same one."""
    given = rewards_G[~np.isnan(rewards_G)]
    return not len(given) or bool(np.ptp(given) == 0)


def group_spans(batch: list[Entry]) -> Iterator[Span]:
    """What was done for each group before training: sampled, scored, given reference log-probs."""
    for entry in batch:
        ready, told = entry.ready, {"uid": entry.uid, "attempt": entry.attempt, "tokens": entry.num_tokens}
        worker = f"rollout worker {entry.worker}"
        yield Span(GENERATE, f"engine {entry.engine}", entry.start_s, entry.end_s, told)
        scored_s = entry.end_s + ready.score_s
        yield Span("score", worker, entry.end_s, scored_s, told)
        if ready.reference_s:
            yield Span("reference", worker, scored_s, scored_s + ready.reference_s, told)


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
