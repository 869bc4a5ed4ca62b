"""The frozen policy: log-probs of samples as they come.

Takes:  a model's path, a type, a device; some Samples a call (a group, some pairs), from many callers at once.
Gives:  `await logprobs(samples)`: (T,) float32 each, 0 off the mask.
Knows:  a call's samples are packed together, and with no other call's, up to max_tokens_per_forward: how far a row is
        padded shows in its last bits, and who asks at the same moment depends on who was faster.
Never:  trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
import torch

from flux_ray.batch import Serving, pack
from flux_ray.model import load_policy
from flux_ray.model.load import PolicyLoading
from flux_ray.model.scoring import per_sample
from flux_ray.records import Sample


class Reference:
    """A policy that stays as it was. Calls are served in the order they came; a failed forward fails its callers."""

    def __init__(
        self, path: str | Path, *, device: str, temperature: float, max_tokens_per_forward: int,
        **loading: Unpack[PolicyLoading],
    ) -> None:
        """`loading`: dtype, chunk_tokens, attention, layout, as `load_policy` takes them."""
        self.policy = load_policy(path, **loading)
        self.policy.to(device).eval().requires_grad_(False)
        self.device, self.temperature = device, temperature
        self.max_tokens_per_forward = max_tokens_per_forward
        self._serving = Serving(self.forward, cost=_num_tokens, max_cost=max_tokens_per_forward)

    async def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """(T,) float32 log-probs of each sample, at the temperature it was made with; 0 where the loss mask is False.

        Waits for the forwards of its own process only; whoever calls over a network sets the deadline.
        """
        return await self._serving.ask(samples)

    @torch.no_grad()
    def forward(self, callers: list[Sequence[Sample]]) -> list[list[np.ndarray]]:
        """Log-probs of each caller's samples, in forwards of at most max_tokens_per_forward tokens (with padding)."""
        return [self._of_one(samples) for samples in callers]

    def _of_one(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        micro_batches = pack(samples, max_tokens=self.max_tokens_per_forward, max_samples=None,
                             padded=self.policy.layout == "padded", device=self.device)
        values = [
            self.policy(m.to(self.device), temperature=self.temperature, with_entropy=False)[0] for m in micro_batches
        ]
        return per_sample(values, micro_batches, len(samples))


def _num_tokens(samples: Sequence[Sample]) -> int:
    return sum(sample.num_tokens for sample in samples)
