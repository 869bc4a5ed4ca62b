"""How much each token weighs in the loss of a step.

Takes:  a sample's loss mask; the counts of a whole update.
Gives:  `loss_weights`, (T,) per sample, and `divisor`, what all of them are divided by; `step_counts`, from scores and
        lengths alone.
Knows:  aggregation is data: the loss is the sum of weight times per-token loss over the divisor, however it is split
        over micro-batches; only the divisor depends on groups that may not be there yet.
Never:  sees a token, a log-prob or an advantage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flux_ray.errors import unknown
from flux_ray.formula import Formula
from flux_ray.records import ScoredGroup


@dataclass(frozen=True)
class StepCounts:
    """Sums over all ranks of one optimizer update. Only sequences with a loss token count: an empty response, a sample
    that nothing scored, and a truncated one that is masked are in neither number."""

    num_sequences: int
    num_tokens: int  # loss tokens

    def __add__(self, other: StepCounts) -> StepCounts:
        return StepCounts(self.num_sequences + other.num_sequences, self.num_tokens + other.num_tokens)


@dataclass(frozen=True)
class Aggregation:
    """A token weighs token(its sequence's loss tokens, the longest response allowed) over a count of the update."""

    formula: Formula  # of the weight: N_tokens and N_sequences are those of StepCounts, L its sequence's loss tokens
    token: Callable[[int, int], float]
    divisor: Callable[[StepCounts], int]


def _num_sequences(counts: StepCounts) -> int:
    return counts.num_sequences


AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": Aggregation(
        Formula("1/N_tokens: the mean over all loss tokens of the update",
                "2503.14476, eq. 12 (there over the tokens of a group)"),
        lambda length, max_tokens: 1.0, lambda counts: counts.num_tokens),
    "sequence_mean": Aggregation(
        Formula("1/(N_sequences·L): the mean over sequences of the mean over their L loss tokens", "2402.03300, eq. 3"),
        lambda length, max_tokens: 1 / length, _num_sequences),
    "constant_length": Aggregation(
        Formula("1/(N_sequences·{rollout.max_tokens}): sums over tokens, divided by rollout.max_tokens and never by "
                "their own length", "2503.20783, section 3.2"),
        lambda length, max_tokens: 1 / max_tokens, _num_sequences),
    # It is spread evenly over the loss tokens, so that a loss which is the same at each of them counts once, and
    # per-token terms beside it (KL, entropy) are sequence means of token means.
    "sequence": Aggregation(
        Formula("1/(N_sequences·L): each sequence counts once, its value spread over its L loss tokens",
                "2507.18071, eq. 5"),
        lambda length, max_tokens: 1 / length, _num_sequences),
}


def aggregation_of(name: str) -> Aggregation:
    if name not in AGGREGATIONS:
        raise unknown("algo.aggregation", name, AGGREGATIONS)
    return AGGREGATIONS[name]


def divisor(aggregation: str, counts: StepCounts) -> int:
    """What the gradient of an update is divided by, once all its groups are there; at least 1."""
    return max(aggregation_of(aggregation).divisor(counts), 1)


def loss_weights(aggregation: str, *, loss_mask: np.ndarray, max_tokens: int) -> np.ndarray:
    """(T,) float32: the weight of each token before it is divided by `divisor`, 0 where the mask is False.

    `max_tokens` is L_max of constant_length. Raises UserError for an aggregation that isn't known.
    """
    token = aggregation_of(aggregation).token
    length = int(loss_mask.sum())
    if length == 0:
        return np.zeros(len(loss_mask), np.float32)
    return loss_mask.astype(np.float32) * np.float32(token(length, max_tokens))


def in_loss(scored: ScoredGroup, *, mask_truncated: bool) -> np.ndarray:
    """(G,) bool: the samples that the loss counts: scored, not empty, and not truncated where those are masked."""
    kept_G = ~np.isnan(scored.rewards) & (scored.num_loss_tokens > 0)
    return kept_G & ~scored.truncated if mask_truncated else kept_G


def step_counts(scored: Sequence[ScoredGroup], *, mask_truncated: bool) -> StepCounts:
    """Counts of the groups of one optimizer update."""
    kept = [in_loss(group, mask_truncated=mask_truncated) for group in scored]
    return StepCounts(
        num_sequences=int(sum(kept_G.sum() for kept_G in kept)),
        num_tokens=int(sum(group.num_loss_tokens[kept_G].sum() for group, kept_G in zip(scored, kept, strict=True))),
    )
