"""Which engines serve: they live, and have the weights that were published last.

Takes:  deaths and replacements, from the supervisor; what rollout workers say of an engine that failed them.
Gives:  `Engines`: who lives, who serves, who waits for weights; `reached`, with the weight channel open to them.
Knows:  an engine that was replaced has the weights of the model's folder: it serves once it has taken a version.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Sequence

from flux_ray.cluster.group import Actor, ActorDied, ActorError, Group
from flux_ray.cluster.plan import ENGINE
from flux_ray.cluster.supervisor import Supervisor
from flux_ray.protocols import Engine

#: Opens the weight channel from the trainer to these engines.
Connect = Callable[[Sequence[Actor[Engine]]], Awaitable[None]]


class Engines:
    def __init__(self, group: Group[Engine], supervisor: Supervisor, connect: Connect | None) -> None:
        """`connect` None: nothing is trained, so that an engine serves as soon as it stands."""
        self._group, self.supervisor, self._connect = group, supervisor, connect
        self._dead: set[int] = set()  # no other one stands there yet
        self._serving = {actor.incarnation for actor in group}
        self._connected: tuple[str, ...] = ()
        #: To take the version that is being published. At first all: an earlier life may have ended as it asked them.
        self._asked = tuple(actor.incarnation for actor in group)
        self._changed = asyncio.Event()
        self.joined = asyncio.Event()  # one waits for weights
        self.on_change: Callable[[], None] = lambda: None  # who serves has changed
        supervisor.listen(ENGINE, lost=self._lost, replaced=self._replaced)

    @property
    def living(self) -> list[int]:
        return [index for index in range(len(self._group)) if index not in self._dead]

    @property
    def serving(self) -> list[int]:
        return [index for index in self.living if self._group[index].incarnation in self._serving]

    @property
    def waiting(self) -> list[int]:
        """Those that live and have yet to take the weights."""
        return [index for index in self.living if self._group[index].incarnation not in self._serving]

    def incarnation(self, index: int) -> str:
        return self._group[index].incarnation

    async def reached(self, only: Collection[int] | None = None) -> list[int]:
        """The living ones (of `only`), with the weight channel open to them. Waits for one where none lives."""
        while not self.living and only is None:
            self._changed.clear()
            await self._changed.wait()
        found = [index for index in self.living if only is None or index in only]
        self._asked = incarnations = tuple(self._group[index].incarnation for index in found)
        if found and self._connect is not None and incarnations != self._connected:
            self._connected = ()
            await self._connect([self._group[index] for index in found])
            self._connected = incarnations
        return found

    def serve(self, indices: Collection[int]) -> None:
        """They have taken the version that was published last."""
        self._serving |= {self._group[index].incarnation for index in indices}
        self.on_change()

    def end(self, index: int, why: str, *, incarnation: str | None = None) -> None:
        """Another one is to stand there. It may be dead already, or only seem so to who asked it.

        `incarnation`: who is meant, where another one may stand there by now.
        """
        standing = self._group[index].incarnation
        if incarnation not in (None, standing):
            return
        self._serving.discard(standing)
        self.supervisor.end_silent(ENGINE, index, standing, why)
        self.on_change()

    async def one_dies(self, within_s: float) -> bool:
        """Whether one of those that were asked to take a version is dead, or dies within so many seconds."""
        self._connected = ()
        try:
            async with asyncio.timeout(within_s):
                while {self._group[index].incarnation for index in self.living}.issuperset(self._asked):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def abandon_update(self, deadline_s: float) -> None:
        """A publish broke off: those that were asked and live go on with the weights of before, or are ended."""
        asked = [index for index in self.living if self._group[index].incarnation in self._asked]
        await asyncio.gather(*(self._abandon(index, deadline_s) for index in asked))

    async def _abandon(self, index: int, deadline_s: float) -> None:
        actor = self._group[index]
        with contextlib.suppress(ActorDied):
            try:
                is_whole = await actor.call(Engine.abandon_update).within(deadline_s)
            except (ActorError, TimeoutError):
                is_whole = False
            if not is_whole:
                self.end(index, f"engine {index} had loaded a part of an update that broke off",
                         incarnation=actor.incarnation)
                await self._until_lost(index, actor.incarnation)

    async def _until_lost(self, index: int, incarnation: str) -> None:
        while index in self.living and self._group[index].incarnation == incarnation:
            self._changed.clear()
            await self._changed.wait()

    def _lost(self, index: int) -> None:
        self._dead.add(index)
        self._serving.discard(self._group[index].incarnation)
        self._changed.set()
        self.on_change()

    def _replaced(self, index: int) -> None:
        self._dead.discard(index)
        self._changed.set()
        if self._connect is None:
            return self.serve([index])
        self.joined.set()
