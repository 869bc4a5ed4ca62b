"""One rank's share of a step's batch, divided into updates and micro-batches.

Takes:  whole groups with their scores; the counts of the other ranks, by one sum.
Gives:  RankBatch, `split` (a part for each update of an epoch), `packed`, `flat`, `divided`.
Knows:  policy and critic divide alike: into equal parts, each weighed by its own counts.
Never:  splits a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flux_ray import algo
from flux_ray.batch import MicroBatch, StepCounts, pack, step_counts
from flux_ray.config import BatchConfig, PolicyConfig
from flux_ray.observability.metrics import Metric, Sum
from flux_ray.records import RolloutGroup, Sample, ScoredGroup
from flux_ray.train.engine import Engine

PerGroup = Sequence[Sequence[np.ndarray]]  # by group and trajectory, (T,) each


@dataclass(frozen=True)
class RankBatch:
    """Whole groups. `step`: how many are done; `versions`: those that hold the policy of that step."""

    groups: Sequence[RolloutGroup]
    scores: Sequence[ScoredGroup]
    step: int
    versions: Sequence[int]
    reference_logprobs: PerGroup | None = None
    values: PerGroup | None = None  # the critic's, from before the step


@dataclass(frozen=True)
class Part:
    """What one update is made from: some of the groups, the place of their samples, and all ranks' counts of them."""

    batch: RankBatch
    samples: slice
    counts: StepCounts


def split(engine: Engine, config: PolicyConfig, batch: RankBatch) -> list[Part]:
    """Consecutive groups of this rank, algo.mini_batches parts. Collective."""
    bounds = np.linspace(0, len(batch.groups), config.algo.mini_batches + 1).astype(int)
    first_sample = np.cumsum([0, *(len(group.trajectories) for group in batch.groups)])
    parts = [_part(batch, slice(a, b)) for a, b in itertools.pairwise(bounds)]
    mine = [step_counts(part.scores, mask_truncated=algo.masks_truncated(config)) for part in parts]
    everyone = engine.sum(torch.tensor([[c.num_sequences, c.num_tokens] for c in mine], dtype=torch.int64))
    counts = [StepCounts(num_sequences=int(n), num_tokens=int(t)) for n, t in everyone.tolist()]
    samples = [slice(int(a), int(b)) for a, b in itertools.pairwise(first_sample[bounds])]
    return [Part(*given) for given in zip(parts, samples, counts, strict=True)]


def _part(batch: RankBatch, groups: slice) -> RankBatch:
    def of(values: PerGroup | None) -> PerGroup | None:
        return None if values is None else values[groups]

    return replace(batch, groups=batch.groups[groups], scores=batch.scores[groups],
                   reference_logprobs=of(batch.reference_logprobs), values=of(batch.values))


def packed(engine: Engine, config: BatchConfig, samples: Sequence[Sample]) -> list[MicroBatch]:
    """Micro-batches of the configured budget, for the model's layout."""
    return pack(samples, max_tokens=config.max_tokens_per_micro_batch, max_samples=config.micro_batch_size,
                padded=engine.model.layout == "padded", device=engine.device)


def flat(per_sample_values: Sequence[np.ndarray], micro_batch: MicroBatch) -> Tensor:
    """The (S,) axis of a micro-batch from per-sample arrays."""
    return torch.from_numpy(np.concatenate([per_sample_values[i] for i in micro_batch.sample_ids_B.tolist()]))


def divided(metrics: dict[str, Metric], loss: str, divisor: float) -> dict[str, Metric]:
    """The metrics of an update, its loss divided as its gradient was."""
    return {name: Sum(metric.value / divisor) if name == loss else metric for name, metric in metrics.items()}
