"""Between trajectories and the flat axis, for whoever only wants log-probs.

Takes:  rollout groups; afterwards the (S,) values of each packed micro-batch.
Gives:  Samples without a say in any loss; the values per trajectory again, (T,) float32.
Never:  runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from flux_ray.model.packed import PackedTokens
from flux_ray.records import RolloutGroup, Sample


def scoring_samples(groups: Sequence[RolloutGroup], *, with_experts: bool = False) -> list[Sample]:
    """One Sample per trajectory, group by group; its loss weights are 0. `with_experts`: those that the engine chose,
    for the policy that it serves and no other model."""
    return [
        Sample(t.token_ids, t.loss_mask, np.zeros(t.num_tokens, np.float32),
               experts=t.experts if with_experts else None)
        for group in groups for t in group.trajectories
    ]


def per_sample(values: Sequence[Tensor], micro_batches: Sequence[PackedTokens], num_samples: int) -> list[np.ndarray]:
    """(S,) values of each micro-batch ► (T,) float32 per sample, in the order the samples were packed from."""
    arrays: list[np.ndarray | None] = [None] * num_samples
    for values_S, micro_batch in zip(values, micro_batches, strict=True):
        rows = values_S.detach().float().cpu().numpy()
        ends = np.cumsum(micro_batch.lengths_B.numpy())
        for i, row in zip(micro_batch.sample_ids_B.tolist(), np.split(rows, ends[:-1]), strict=True):
            arrays[i] = row.copy()  # its own memory: a view would keep the whole micro-batch alive
    assert all(array is not None for array in arrays), "every sample is in one micro-batch"
    return [array for array in arrays if array is not None]


def by_group(arrays: Sequence[np.ndarray], groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
    """Per-sample arrays ► per group, per trajectory."""
    remaining = iter(arrays)
    return [[next(remaining) for _ in group.trajectories] for group in groups]


def response_sums(arrays: Sequence[np.ndarray]) -> list[float]:
    """The sum of each sample's (T,) log-probs, which are 0 at all but its response."""
    return [float(array.sum(dtype=np.float64)) for array in arrays]
