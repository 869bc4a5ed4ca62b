"""The stages of a training without rollouts, as its loop sees them: calls to training ranks, and to a reference.

Takes:  samples, pairs or groups with their tokens (they are in the driver already).
Gives:  a step or an evaluation on all ranks, each with its share; the reference's log-probs.
Knows:  where the reference is: in actors of its own, or in the ranks, without their adapter.
Never:  decides anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import TypeVar

import numpy as np

from flux_ray.batch import balance
from flux_ray.cluster.group import Group, Router, first_failure
from flux_ray.cluster.usual import Usual
from flux_ray.config import ReferenceConfig, TrainConfig
from flux_ray.data import OfflineGroup
from flux_ray.protocols import LogprobSums, ReferenceScorer, TrainingRank
from flux_ray.records import PreferencePair, Sample, StepReport

CHUNKS_AT_ONCE = 2  # of an actor: one that it works on, one that waits there

Item = TypeVar("Item")
Result = TypeVar("Result")


class OfflineStages:
    """Training ranks and reference actors (or none)."""

    def __init__(self, config: TrainConfig, settings: ReferenceConfig, *, trainer: Group[TrainingRank],
                 reference: Group[ReferenceScorer] | None) -> None:
        """`settings`: of the reference."""
        self._config, self.trainer, self._reference, self._settings = config, trainer, reference, settings
        self._usual = Usual()
        self._router: Router[ReferenceScorer] = Router()
        # A deadline counts from the sending of a chunk: it waits here until an actor will soon be free for it.
        self._turns = asyncio.Semaphore(CHUNKS_AT_ONCE * (len(reference) if reference is not None else 1))

    async def sft_step(self, samples: list[Sample]) -> StepReport:
        return (await self._each(TrainingRank.sft_step, self._samples(samples)))[0]

    async def sft_metrics(self, samples: list[Sample]) -> dict[str, float]:
        return (await self._each(TrainingRank.sft_metrics, self._samples(samples)))[0]

    async def pair_step(self, pairs: list[PreferencePair], reference: list[LogprobSums] | None) -> StepReport:
        return (await self._each(TrainingRank.pair_step, self._pairs(pairs, reference)))[0]

    async def pair_metrics(self, pairs: list[PreferencePair], reference: list[LogprobSums] | None) -> dict[str, float]:
        return (await self._each(TrainingRank.pair_metrics, self._pairs(pairs, reference)))[0]

    async def _each(self, method: Callable[..., Result], calls: Sequence[Mapping[str, object]]) -> list[Result]:
        """The same method on every rank, each with its own share. Rank 0's answer is reduced over ranks already."""
        return await self._usual.all_within(
            method.__name__, [rank.call(method, **call) for rank, call in zip(self.trainer, calls, strict=True)],
            self._config.deadline_s)

    def _shares(self, sizes: list[int]) -> list[list[int]]:
        return balance(sizes, len(self.trainer))

    def _samples(self, samples: list[Sample]) -> list[dict[str, list[Sample]]]:
        return [{"samples": [samples[i] for i in share]} for share in self._shares([s.num_tokens for s in samples])]

    def _pairs(self, pairs: list[PreferencePair], reference: list[LogprobSums] | None) -> list[dict[str, object]]:
        return [
            {
                "pairs": [pairs[i] for i in share],
                "reference_logprobs": None if reference is None else [reference[i] for i in share],
            }
            for share in self._shares([pair.num_tokens for pair in pairs])
        ]

    async def pair_reference(self, pairs: list[PreferencePair]) -> list[LogprobSums]:
        """The reference's log-probs of each pair's responses, (chosen, rejected) sums."""
        if self._reference is None:
            shares = self._shares([pair.num_tokens for pair in pairs])
            parts = await self._each(TrainingRank.pair_reference,
                                     [{"pairs": [pairs[i] for i in share]} for share in shares])
        else:
            shares = _chunks([pair.num_tokens for pair in pairs], self._settings.max_tokens_per_forward)
            parts = await first_failure([
                self._ask(ReferenceScorer.pair_logprobs, [pairs[i] for i in share],
                          sum(pairs[i].num_tokens for i in share)) for share in shares])
        sums = {i: of_pair for share, part in zip(shares, parts, strict=True)
                for i, of_pair in zip(share, part, strict=True)}
        return [sums[i] for i in range(len(pairs))]

    async def _ask(
        self, method: Callable[[ReferenceScorer, Sequence[Item]], Coroutine[object, object, list[Result]]],
        items: Sequence[Item], num_tokens: int,
    ) -> list[Result]:
        assert self._reference is not None
        async with self._turns:
            actor = self._router.choose(list(self._reference), num_tokens)
            try:
                return await actor.call(method, items).within(self._settings.deadline_s)
            finally:
                self._router.done(actor, num_tokens)

    async def group_step(self, groups: list[OfflineGroup], *, step: int) -> StepReport:
        """The policy's step on given groups."""
        sizes = [int(group.scored.num_tokens.sum()) for group in groups]
        reference: list[list[np.ndarray]] | None = None
        if self._reference is not None:
            chunks = _chunks(sizes, self._settings.max_tokens_per_forward)
            given = await first_failure([
                self._ask(ReferenceScorer.group_logprobs, [groups[i].group for i in chunk],
                          sum(sizes[i] for i in chunk)) for chunk in chunks])
            reference = [of_group for of_chunk in given for of_group in of_chunk]
        calls: list[dict[str, object]] = [
            {
                "groups": [groups[i].group for i in share],
                "scores": [groups[i].scored for i in share],
                "reference_logprobs": None if reference is None else [reference[i] for i in share],
                "step": step,
            }
            for share in self._shares(sizes)
        ]
        return (await self._each(TrainingRank.train_step, calls))[0]


def _chunks(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places of consecutive items of at most so many tokens together; a longer item is alone."""
    chunks: list[list[int]] = []
    tokens = 0
    for i, size in enumerate(sizes):
        if not chunks or tokens + size > max_tokens:
            chunks.append([])
            tokens = 0
        chunks[-1].append(i)
        tokens += size
    return chunks
