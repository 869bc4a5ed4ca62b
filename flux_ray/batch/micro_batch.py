"""Micro-batches: sequences concatenated on one flat axis, and the padded view of their responses.

Takes:  Samples and a token budget.
Gives:  MicroBatch, the one packed form; `to_padded`, `padded_mask`, `to_flat` between the axes; `without_weight`.
Knows:  axes S (all tokens of a micro-batch, no padding), B (its sequences), L (the longest response view).
Never:  weighs, scores or reorders inside a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from flux_ray.records import Sample

_FLAT = ("token_ids_S", "position_ids_S", "loss_mask_S", "loss_weights_S", "advantages_S", "sampler_logprobs_S",
         "reference_logprobs_S", "current_version_B", "experts_SLK")


@dataclass(frozen=True)
class MicroBatch:
    """Whole sequences side by side. Position t of every *_S tensor speaks of token t itself: its log-prob is that of
    sampling token t after the tokens before it (0 at the start of a sequence, which nothing precedes).

    `lengths_B`, `response_starts_B` and `sample_ids_B` stay on the CPU wherever the rest goes: shapes are made from
    them and must not wait for a device.
    """

    token_ids_S: torch.Tensor                  # int64
    position_ids_S: torch.Tensor               # int64, from 0 in every sequence
    lengths_B: torch.Tensor                    # int64, on the CPU; sums to S
    loss_mask_S: torch.Tensor                  # bool
    loss_weights_S: torch.Tensor               # float32, 0 where the mask is False
    advantages_S: torch.Tensor | None          # float32
    sampler_logprobs_S: torch.Tensor | None    # float32
    reference_logprobs_S: torch.Tensor | None  # float32
    current_version_B: torch.Tensor            # bool
    sample_ids_B: torch.Tensor                 # int64, on the CPU: index into the list given to `pack`
    response_starts_B: torch.Tensor            # int64, on the CPU: place of the first loss token; the length where none
    experts_SLK: torch.Tensor | None = None    # int16, of L layers: the engine's choice; -1 where it isn't known

    @property
    def num_sequences(self) -> int:
        return len(self.lengths_B)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids_S)

    @property
    def num_padded_tokens(self) -> int:
        """Tokens of the same sequences as padded rows: rows times the longest."""
        return self.num_sequences * int(self.lengths_B.max())

    def to(self, device: torch.device | str) -> MicroBatch:
        moved = {name: getattr(self, name) for name in _FLAT}
        return replace(self, **{name: None if value is None else value.to(device) for name, value in moved.items()})


def make_micro_batch(samples: Sequence[Sample], *, sample_ids: Sequence[int]) -> MicroBatch:
    """One MicroBatch of all these samples, in this order. An optional array is there when every sample has it."""
    assert samples and len(samples) == len(sample_ids), (len(samples), len(sample_ids))
    lengths = [sample.num_tokens for sample in samples]
    return MicroBatch(
        token_ids_S=_flat(samples, lambda s: s.token_ids, np.int64),
        position_ids_S=torch.from_numpy(np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])),
        lengths_B=torch.tensor(lengths, dtype=torch.int64),
        loss_mask_S=_flat(samples, lambda s: s.loss_mask, np.bool_),
        loss_weights_S=_flat(samples, lambda s: s.loss_weights, np.float32),
        advantages_S=_flat_if_all(samples, lambda s: s.advantages),
        sampler_logprobs_S=_flat_if_all(samples, lambda s: s.sampler_logprobs),
        reference_logprobs_S=_flat_if_all(samples, lambda s: s.reference_logprobs),
        current_version_B=torch.tensor([s.current_version for s in samples], dtype=torch.bool),
        sample_ids_B=torch.tensor(list(sample_ids), dtype=torch.int64),
        response_starts_B=torch.tensor([first_loss_token(s.loss_mask) for s in samples], dtype=torch.int64),
        experts_SLK=_experts(samples, lengths),
    )


def _experts(samples: Sequence[Sample], lengths: Sequence[int]) -> torch.Tensor | None:
    """None where no sample has any."""
    layers_K = next((sample.experts.shape[1:] for sample in samples if sample.experts is not None), None)
    if layers_K is None:
        return None
    experts_SLK = np.full((sum(lengths), *layers_K), -1, np.int16)
    for sample, end in zip(samples, np.cumsum(lengths).tolist(), strict=True):
        if sample.experts is not None:
            start = end - sample.num_tokens
            experts_SLK[start : start + len(sample.experts)] = sample.experts
    return torch.from_numpy(experts_SLK)


def first_loss_token(loss_mask_T: np.ndarray) -> int:
    """Position of the first True; the length where there is none."""
    return int(loss_mask_T.argmax()) if loss_mask_T.any() else len(loss_mask_T)


def without_weight() -> MicroBatch:
    """Two tokens that nobody learns from, for a rank that has nothing left while others still train."""
    nothing = Sample(np.zeros(2, np.int32), np.zeros(2, bool), np.zeros(2, np.float32))
    return make_micro_batch([nothing], sample_ids=[0])


def to_padded(values_S: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """(S,) ► (B, L), the response view: row b runs from the sample's first loss token to its end; zeros where padded.

    L is the longest such run, at least 1 (so that a micro-batch without loss tokens still has a shape). Differentiable.
    """
    index_BL, inside_BL = _response_index(micro_batch, values_S.device)
    return values_S[index_BL].masked_fill(~inside_BL, 0)


def padded_mask(micro_batch: MicroBatch) -> torch.Tensor:
    """(B, L) bool: the loss mask in the response view (False on padding and on tokens the policy didn't sample)."""
    return to_padded(micro_batch.loss_mask_S, micro_batch)


def to_flat(values_BL: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
    """(B, L) ► (S,): the inverse of `to_padded`, with zeros at the tokens outside the response view. Differentiable."""
    index_BL, inside_BL = _response_index(micro_batch, values_BL.device)
    assert values_BL.shape == index_BL.shape, (tuple(values_BL.shape), tuple(index_BL.shape))
    flat_S = torch.zeros(micro_batch.num_tokens, dtype=values_BL.dtype, device=values_BL.device)
    return flat_S.index_put((index_BL[inside_BL],), values_BL[inside_BL])


def _response_index(micro_batch: MicroBatch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """For each place of the response view: where it lies on the flat axis, and whether it is there at all."""
    lengths_B, starts_B = micro_batch.lengths_B, micro_batch.response_starts_B
    responses_B = lengths_B - starts_B
    column_L = torch.arange(max(int(responses_B.max()), 1))
    inside_BL = column_L < responses_B[:, None]
    index_BL = (lengths_B.cumsum(0) - responses_B)[:, None] + column_L
    return index_BL.masked_fill(~inside_BL, 0).to(device), inside_BL.to(device)


def _flat(samples: Sequence[Sample], get: Callable[[Sample], np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.asarray(get(sample), dtype=dtype) for sample in samples]))


def _flat_if_all(samples: Sequence[Sample], get: Callable[[Sample], np.ndarray | None]) -> torch.Tensor | None:
    arrays = [value for value in map(get, samples) if value is not None]
    assert len(arrays) in (0, len(samples)), "an array that some samples have and others lack"
    return torch.from_numpy(np.concatenate(arrays).astype(np.float32, copy=False)) if arrays else None
