"""Generation of groups: each prompt's request, or the parts of it, on the engines.

Takes:  a prompt, the version at which it started, what lengths to expect.
Gives:  Rolled: a handle of the group, and what it cost.
Knows:  that a group may be made of parts that several engines drew: the same samples, for the seeds are theirs.
Never:  leaves a request on an engine that nobody waits for any more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from flux_ray.cluster.group import ActorGroup, first_failure
from flux_ray.config import Config
from flux_ray.driver.clock import now_s
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import QUEUED_SHARE, Dispatch, Lengths, Request, split


@dataclass(frozen=True)
class Rolled:
    """A group that engines have generated: a handle of it, and what it cost."""

    group: Any  # handle of a RolloutGroup
    row: int  # of the data, from 0
    num_tokens: int  # sampled tokens
    num_spanning: int  # samples whose tokens are of more than one version
    engine: int  # that holds it
    start_s: float  # on the driver's clock
    end_s: float


class Rolling:
    """The engines, and the requests that wait for them."""

    def __init__(self, config: Config, engines: ActorGroup) -> None:
        self._config, self._engines = config, engines
        # What still waits in an engine when new weights come would find its prefix as the old ones computed it.
        keeps = config.rollout.kv_after_update == "keep" and config.driver.max_staleness > 0
        queued_share = 0.0 if keeps else QUEUED_SHARE
        self._dispatch = Dispatch(engines.size, room=config.rollout.max_num_seqs, queued_share=queued_share)

    async def roll(self, prompt: Prompt, *, lengths: Lengths, born: int, temperature: float | None) -> Rolled:
        """Generate the prompt's group, in rollout.split_groups requests. `lengths` learns what it became."""
        expected = lengths.expected(prompt.row)
        parts = split(prompt, self._config.rollout.split_groups)
        requests = [Request(born, part.num_samples, len(part.token_ids), expected) for part in parts]
        if len(parts) == 1:
            rolled = await self._one(prompt, requests[0], temperature)
        else:
            rolled = await self._joined(prompt, await first_failure(
                [self._one(part, request, temperature) for part, request in zip(parts, requests, strict=True)]))
        lengths.saw(prompt.row, rolled.num_tokens / prompt.num_samples)
        return rolled

    async def _one(self, prompt: Prompt, request: Request, temperature: float | None) -> Rolled:
        rollout = self._config.rollout
        async with self._dispatch.turn(request) as engine:
            start_s = now_s()
            group, small = self._engines.submit(engine, "roll", prompt, temperature, num_returns=2)
            try:
                numbers = await self._engines.result(
                    small,
                    index=engine,
                    what=f"rollout of prompt row {prompt.row + 1} (from 1)",
                    # The engine's own deadline comes first and names the prompt; this one is for one that is silent.
                    deadline_s=rollout.deadline_s + self._config.weights.deadline_s,
                )
            except asyncio.CancelledError:
                self._engines.cancel(small)
                raise
            return Rolled(group, prompt.row, engine=engine, start_s=start_s, end_s=now_s(), **numbers)

    async def _joined(self, prompt: Prompt, parts: list[Rolled]) -> Rolled:
        """One group of the parts, made where the first of them lies."""
        engine = parts[0].engine
        group, done = self._engines.submit(engine, "join", prompt, [part.group for part in parts], num_returns=2)
        deadline_s = self._config.rollout.deadline_s
        await self._engines.result(done, index=engine, what="joining a group's parts", deadline_s=deadline_s)
        num_tokens, num_spanning = sum(p.num_tokens for p in parts), sum(p.num_spanning for p in parts)
        return Rolled(group, prompt.row, num_tokens, num_spanning, engine, min(p.start_s for p in parts), now_s())
