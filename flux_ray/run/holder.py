"""Brings the groups that a rank trains on from the rollout workers that own them, and holds them.

Takes:  groups, by where their arrays are; who is alive.
Gives:  their arrays, once all are here; the groups that can't be had; back to the workers what a step made of them.
Never:  begins anything collective.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from flux_ray.cluster.group import ActorDied, Members, first_failure
from flux_ray.cluster.plan import ROLLOUT
from flux_ray.messages import GroupAt, OwnedGroup, TrainedTokens
from flux_ray.protocols import GroupOwner
from flux_ray.records import RolloutGroup, ScoredGroup

GIVE_AT_ONCE = 64  # groups in one answer: a batch of long groups must not be one object in the store
GIVE_DEADLINE_S = 300.0  # of one answer


class Holder:
    def __init__(self) -> None:
        self.members = Members()
        self._held: dict[int, OwnedGroup] = {}  # by uid
        self.places: list[GroupAt] = []  # of those that are held

    async def hold(self, groups: Sequence[GroupAt]) -> list[GroupAt]:
        """Hold these groups in place of those held before. Gives those that can't be had."""
        of_worker: dict[int, list[GroupAt]] = defaultdict(list)
        for at in groups:
            of_worker[at.worker].append(at)
        chunks = [all_of[i : i + GIVE_AT_ONCE] for all_of in of_worker.values()
                  for i in range(0, len(all_of), GIVE_AT_ONCE)]
        given = await first_failure([self._bring(chunk) for chunk in chunks])
        owned = {at: one for chunk, of_chunk in zip(chunks, given, strict=True)
                 for at, one in zip(chunk, of_chunk, strict=True)}
        self._held = {at.uid: one for at in groups if (one := owned[at]) is not None}
        self.places = [at for at in groups if at.uid in self._held]
        return [at for at in groups if at.uid not in self._held]

    async def _bring(self, groups: Sequence[GroupAt]) -> Sequence[OwnedGroup | None]:
        worker = self.members.of(ROLLOUT)[groups[0].worker]
        try:
            return await worker.call(GroupOwner.give, groups).within(GIVE_DEADLINE_S)
        except (ActorDied, TimeoutError):  # dead, or as good as dead: its groups start again
            return [None] * len(groups)

    async def give_back(self, made: Sequence[TrainedTokens]) -> None:
        """What became of groups, to the workers that own them. A worker that is lost has lost its groups too."""
        async def give(one: TrainedTokens) -> None:
            worker = self.members.of(ROLLOUT)[one.groups[0].worker]
            with contextlib.suppress(ActorDied, TimeoutError):
                await worker.call(GroupOwner.take_back, one).within(GIVE_DEADLINE_S)

        await first_failure([give(one) for one in made])

    @property
    def held(self) -> list[OwnedGroup]:
        """In the order in which they were asked for."""
        return list(self._held.values())

    @property
    def scores(self) -> list[ScoredGroup]:
        return [one.scored for one in self.held if one.scored is not None]

    @property
    def reference_logprobs(self) -> list[list[np.ndarray]]:
        """Where groups have them: a probe's have none."""
        return [one.reference_logprobs for one in self.held if one.reference_logprobs is not None]

    @property
    def groups(self) -> list[RolloutGroup]:
        return [one.group for one in self.held]
