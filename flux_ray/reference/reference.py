"""The frozen policy: log-probs of samples as they come, those of several callers in one forward.

Takes:  a model's path, a type, a device; some Samples a call (a group, some pairs), from many callers at once.
Gives:  `await logprobs(samples)`: (T,) float32 each, 0 off the mask.
Knows:  what arrives while a forward runs waits and is packed together, up to max_tokens_per_forward.
Never:  trains, or blocks its event loop: the forward runs in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux_ray.batch import pack
from flux_ray.model import load_policy
from flux_ray.model.scoring import per_sample
from flux_ray.records import Sample

Waiting = tuple[Sequence[Sample], asyncio.Future[list[np.ndarray]]]


class Reference:
    """A policy that stays as it was. Calls are served in the order they came; a failed forward fails its callers."""

    def __init__(
        self, path: str | Path, *, device: str, temperature: float, max_tokens_per_forward: int, **loading: Any,
    ) -> None:
        """`loading`: dtype, chunk_tokens, attention, layout, as `load_policy` takes them."""
        self.policy = load_policy(path, **loading)
        self.policy.to(device).eval().requires_grad_(False)
        self.device, self.temperature = device, temperature
        self.max_tokens_per_forward = max_tokens_per_forward
        self._waiting: list[Waiting] = []
        self._server: asyncio.Task[None] | None = None

    async def logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """(T,) float32 log-probs of each sample, at the temperature it was made with; 0 where the loss mask is False.

        Waits for the forward of its own process only; whoever calls over a network sets the deadline.
        """
        answer: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()
        self._waiting.append((samples, answer))
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        return await answer

    async def _serve(self) -> None:
        """Forward after forward until nobody waits."""
        try:
            while self._waiting:
                await self._answer(self._take())
        finally:  # nobody is left waiting for a server that was cancelled
            for _, answer in self._waiting:
                answer.cancel()

    async def _answer(self, batch: list[Waiting]) -> None:
        """One forward for these callers; what it raises is theirs. A caller may have given up meanwhile."""
        try:
            results = await asyncio.to_thread(self.forward, [samples for samples, _ in batch])
        except BaseException as error:
            failed = error if isinstance(error, Exception) else None
            for answer in (answer for _, answer in batch if not answer.done()):
                answer.set_exception(failed) if failed else answer.cancel()
            if failed is None:
                raise
            return
        for (_, answer), result in zip(batch, results, strict=True):
            if not answer.done():
                answer.set_result(result)

    def _take(self) -> list[Waiting]:
        """The oldest callers whose samples fit in one forward together; at least one."""
        tokens, count = 0, 0
        for samples, _ in self._waiting:
            tokens += sum(sample.num_tokens for sample in samples)
            if count and tokens > self.max_tokens_per_forward:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    @torch.no_grad()
    def forward(self, callers: list[Sequence[Sample]]) -> list[list[np.ndarray]]:
        """Log-probs of each caller's samples, in forwards of at most max_tokens_per_forward tokens (with padding)."""
        samples = [sample for of_one in callers for sample in of_one]
        micro_batches = pack(samples, max_tokens=self.max_tokens_per_forward, max_samples=None,
                             padded=self.policy.layout == "padded")
        values = [
            self.policy(m.to(self.device), temperature=self.temperature, with_entropy=False)[0] for m in micro_batches
        ]
        rows = iter(per_sample(values, micro_batches, len(samples)))
        return [[next(rows) for _ in of_one] for of_one in callers]
