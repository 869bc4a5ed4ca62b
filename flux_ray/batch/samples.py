"""From groups of rollouts to samples that can be trained on.

Takes:  RolloutGroups with their ScoredGroups (the same order), later the advantages made from them.
Gives:  `response_views`: what estimators see, as padded (N, L) tensors; `make_samples`: Samples, in the same row order.
Knows:  rows: group by group, sample by sample; which samples stay out of the loss.
Never:  computes an advantage; decodes a token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flux_ray.batch.micro_batch import first_loss_token
from flux_ray.batch.weights import in_loss, loss_weights
from flux_ray.records import RolloutGroup, Sample, ScoredGroup, Trajectory


@dataclass(frozen=True)
class ResponseViews:
    """The padded views of N samples: row n runs from its first sampled token to its end. L is at least 1."""

    response_mask_NL: torch.Tensor        # bool: tokens in the loss (all False in rows that leave the loss)
    sampled_mask_NL: torch.Tensor         # bool: tokens that were sampled, those of rows that leave the loss too
    token_level_rewards_NL: torch.Tensor  # float32: the score at the row's last sampled token; nan: nothing scored it
    index_N: torch.Tensor                 # int64: the prompt's uid, the same for the rows of one group
    starts: tuple[int, ...]               # position of each row's first column in its sample
    lengths: tuple[int, ...]              # tokens of each sample (prompt and response)

    def from_samples(self, values: Sequence[np.ndarray]) -> torch.Tensor:
        """Per-sample (T,) arrays ► (N, L), zeros where padded."""
        rows = torch.zeros(self.response_mask_NL.shape, dtype=torch.float32)
        for row, value_T, start in zip(rows, values, self.starts, strict=True):
            row[: len(value_T) - start] = torch.from_numpy(np.asarray(value_T[start:], np.float32))
        return rows

    def to_samples(self, values_NL: torch.Tensor) -> list[np.ndarray]:
        """(N, L) ► per-sample (T,) float32 arrays, zeros before the view."""
        rows = values_NL.detach().to("cpu", torch.float32).numpy()
        samples = []
        for row, start, length in zip(rows, self.starts, self.lengths, strict=True):
            value_T = np.zeros(length, np.float32)
            value_T[start:] = row[: length - start]
            samples.append(value_T)
        return samples


@dataclass(frozen=True)
class Weighting:
    """What the loss weights of a step are made from."""

    aggregation: str
    max_tokens: int       # L_max: the longest response allowed, in tokens


def response_views(
    groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup], *, mask_truncated: bool,
) -> ResponseViews:
    """The views that estimators see. A masked truncated sample loses its mask and keeps its score, which belongs to its
    group's statistics; a sample without a score loses its mask too, and its reward is nan."""
    trajectories = [t for group in groups for t in group.trajectories]
    kept_N = _kept(groups, scored, mask_truncated)
    starts = tuple(first_loss_token(t.loss_mask) for t in trajectories)
    lengths = tuple(t.num_tokens for t in trajectories)
    longest = max((length - start for length, start in zip(lengths, starts, strict=True)), default=0)
    mask_NL = torch.zeros(len(trajectories), max(longest, 1), dtype=torch.bool)
    sampled_NL = mask_NL.clone()
    rewards_NL = torch.zeros(mask_NL.shape, dtype=torch.float32)
    scores = [float(score) for group in scored for score in group.rewards]
    for n, (trajectory, start, score) in enumerate(zip(trajectories, starts, scores, strict=True)):
        loss_mask = trajectory.loss_mask[start:]
        last = int(np.flatnonzero(loss_mask)[-1]) if len(loss_mask) else 0
        rewards_NL[n, last] = score
        sampled_NL[n, : len(loss_mask)] = torch.tensor(loss_mask)  # a copy: what came by Ray can't be written to
        mask_NL[n] = sampled_NL[n] & bool(kept_N[n])
    index_N = torch.tensor([g.prompt.uid for g in groups for _ in g.trajectories], dtype=torch.int64)
    return ResponseViews(mask_NL, sampled_NL, rewards_NL, index_N, starts, lengths)


def make_samples(
    groups: Sequence[RolloutGroup],
    scored: Sequence[ScoredGroup],
    *,
    advantages: Sequence[np.ndarray] | None,
    reference_logprobs: Sequence[Sequence[np.ndarray]] | None,
    weighting: Weighting,
    mask_truncated: bool,
    versions: Collection[int],
) -> list[Sample]:
    """One Sample per trajectory, rows in the order of `response_views`.

    advantages: one (T,) array per row (`ResponseViews.to_samples`), or None where they come after the old log-probs.
    reference_logprobs: per group, per trajectory, (T,). versions: those that hold the trainer's
    present step: more than one where a run went back to a step and published it again.
    """
    kept_N = _kept(groups, scored, mask_truncated)
    trajectories = [t for group in groups for t in group.trajectories]
    reference = None if reference_logprobs is None else [row for group in reference_logprobs for row in group]
    assert advantages is None or len(advantages) == len(trajectories), (len(advantages), len(trajectories))
    assert reference is None or len(reference) == len(trajectories), (len(reference), len(trajectories))
    samples = []
    for n, trajectory in enumerate(trajectories):
        loss_mask = trajectory.loss_mask & kept_N[n]
        weights = loss_weights(weighting.aggregation, loss_mask=loss_mask, max_tokens=weighting.max_tokens)
        samples.append(Sample(
            token_ids=trajectory.token_ids,
            loss_mask=loss_mask,
            loss_weights=weights,
            advantages=None if advantages is None else advantages[n],
            sampler_logprobs=trajectory.sampler_logprobs,
            reference_logprobs=None if reference is None else reference[n],
            current_version=_is_current(trajectory, versions),
            experts=trajectory.experts,
        ))
    return samples


def _kept(groups: Sequence[RolloutGroup], scored: Sequence[ScoredGroup], mask_truncated: bool) -> np.ndarray:
    for group, scores in zip(groups, scored, strict=True):
        assert group.prompt.uid == scores.uid, (group.prompt.uid, scores.uid)
        assert len(group.trajectories) == scores.group_size, (scores.uid, len(group.trajectories), scores.group_size)
    return np.concatenate([np.zeros(0, bool), *(in_loss(s, mask_truncated=mask_truncated) for s in scored)])


def _is_current(trajectory: Trajectory, versions: Collection[int]) -> bool:
    return bool(np.isin(trajectory.versions[trajectory.loss_mask], list(versions)).all())
