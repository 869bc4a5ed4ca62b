"""The live rooms of a training without rollouts: training ranks, and a reference where one is asked.

Takes:  actor groups; samples, pairs or groups with their tokens (they are in the driver already).
Gives:  a step or a measurement on all ranks, each with its share; the reference's log-probs.
Knows:  who the reference is: actors of its own, or the ranks themselves without their adapter.
Never:  decides anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from flux_ray.batch import balance
from flux_ray.cluster.group import ActorGroup, first_failure
from flux_ray.config import Config
from flux_ray.data import OfflineGroup
from flux_ray.driver.kept_reference import Sums
from flux_ray.driver.rooms import TrainingRooms
from flux_ray.records import PreferencePair, Sample, StepReport
from flux_ray.rollout.routing import Router

CHUNKS_AT_ONCE = 2  # of an actor: one that it works on, one that waits there


class OfflineRooms(TrainingRooms):
    """Training ranks and reference actors (or none)."""

    def __init__(self, config: Config, *, trainer: ActorGroup, reference: ActorGroup | None) -> None:
        super().__init__(config, trainer)
        self._reference = reference
        self._router = Router(reference.size) if reference else None
        # A deadline counts from when a chunk is sent: it is sent once an actor is about to be free for it.
        self._turns = asyncio.Semaphore(CHUNKS_AT_ONCE * (reference.size if reference else 1))

    async def sft_step(self, samples: list[Sample]) -> StepReport:
        return await self.step("sft_step", self._sft_calls(samples))

    async def sft_metrics(self, samples: list[Sample]) -> dict[str, float]:
        return await self._measured("sft_metrics", self._sft_calls(samples))

    def _sft_calls(self, samples: list[Sample]) -> list[dict[str, Any]]:
        shares = balance([sample.num_tokens for sample in samples], self._trainer.size)
        return [{"samples": [samples[i] for i in share]} for share in shares]

    async def pair_step(self, pairs: list[PreferencePair], reference: list[Sums] | None) -> StepReport:
        return await self.step("pair_step", self._pair_calls(pairs, reference))

    async def pair_metrics(self, pairs: list[PreferencePair], reference: list[Sums] | None) -> dict[str, float]:
        return await self._measured("pair_metrics", self._pair_calls(pairs, reference))

    def _pair_calls(self, pairs: list[PreferencePair], reference: list[Sums] | None) -> list[dict[str, Any]]:
        return [
            {
                "pairs": [pairs[i] for i in share],
                "reference_logprobs": None if reference is None else [reference[i] for i in share],
            }
            for share in balance([pair.num_tokens for pair in pairs], self._trainer.size)
        ]

    async def pair_reference(self, pairs: list[PreferencePair]) -> list[Sums]:
        """The reference's log-probs of each pair's responses, (chosen, rejected) sums."""
        if self._reference is None:
            shares = balance([pair.num_tokens for pair in pairs], self._trainer.size)
            calls = [{"pairs": [pairs[i] for i in share]} for share in shares]
            parts = await self.on_each("pair_reference", calls)
        else:
            shares = _chunks(pairs, self._config.reference.max_tokens_per_forward)
            parts = await first_failure([self._ask([pairs[i] for i in share]) for share in shares])
        sums = {i: of_pair for share, part in zip(shares, parts, strict=True)
                for i, of_pair in zip(share, part, strict=True)}
        return [sums[i] for i in range(len(pairs))]

    async def _ask(self, pairs: list[PreferencePair]) -> list[Sums]:
        assert self._reference is not None and self._router is not None
        async with self._turns:
            with self._router.route(sum(pair.num_tokens for pair in pairs)) as actor:
                deadline_s = self._config.reference.deadline_s
                return await self._reference.call(actor, "pair_reference", pairs, deadline_s=deadline_s)

    async def group_step(self, groups: list[OfflineGroup], *, version: int) -> StepReport:
        """The policy's step on given groups; the reference's log-probs go from its actors to the ranks."""
        reference = await first_failure([self._group_reference(group) for group in groups])
        shares = balance([int(group.scored.num_tokens.sum()) for group in groups], self._trainer.size)
        calls = [
            {
                "groups": [groups[i].group for i in share],
                "scores": [groups[i].scored for i in share],
                "reference_logprobs": [reference[i] for i in share] if self._reference else None,
                "version": version,
            }
            for share in shares
        ]
        return await self.step("train_step", calls)

    async def _group_reference(self, group: OfflineGroup) -> Any | None:
        if self._reference is None or self._router is None:
            return None
        with self._router.route(int(group.scored.num_tokens.sum())) as actor:
            logprobs, done = self._reference.submit(actor, "logprobs_and_done", group.group, num_returns=2)
            deadline_s = self._config.reference.deadline_s
            await self._reference.result(done, index=actor, what="log-probs", deadline_s=deadline_s)
            return logprobs

    async def _measured(self, method: str, calls: list[dict[str, Any]]) -> dict[str, float]:
        return (await self.on_each(method, calls))[0]  # reduced over ranks: the same on all of them


def _chunks(pairs: Sequence[PreferencePair], max_tokens: int) -> list[list[int]]:
    """Consecutive pairs of at most so many tokens together; a longer pair is alone."""
    chunks: list[list[int]] = []
    tokens = 0
    for i, pair in enumerate(pairs):
        if not chunks or tokens + pair.num_tokens > max_tokens:
            chunks.append([])
            tokens = 0
        chunks[-1].append(i)
        tokens += pair.num_tokens
    return chunks
