"""Watches every actor, and does what its role's policy says when one dies.

Takes:  groups of actors; reports of actors that answer nobody.
Gives:  `failure`, done when the run can't go on; Members, sent whenever they change to all actors that call others.
Knows:  a role's policy is data. The supervisor alone kills and replaces; nobody else keeps a list of actors.
Never:  knows Ray, or what an actor does.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from flux_ray.background import in_background
from flux_ray.cluster.group import Actor, ActorDied, Group, Members, first_failure
from flux_ray.cluster.heartbeat import Heartbeat
from flux_ray.protocols import Meets

MOST_DEATHS = 10  # of one role without a step in between: a role that dies so often will go on dying


class OnDeath(enum.Enum):
    END_RUN = "end the run"
    REPLACE = "replace"


class Supervisor:
    """Of one life of a run; it lives in the driver's process."""

    def __init__(self, *, start_deadline_s: float, heartbeat: bool = True, epoch: int = 0) -> None:
        """`heartbeat`: whether those that answer nothing are ended. `epoch`: of the members that actors know."""
        self._start_deadline_s, self._heartbeat = start_deadline_s, heartbeat
        self._groups: dict[str, Group[Any]] = {}
        self._policies: dict[str, OnDeath] = {}
        self._informed: set[str] = set()
        self._starts: dict[str, Callable[[Any], Any] | None] = {}
        self._listeners: dict[str, tuple[Callable[[int], None], Callable[[int], None]]] = {}
        self._silent: dict[str, str] = {}  # incarnation ► why it was ended
        self._deaths: Counter[str] = Counter()  # by role, since the last step
        self._changed = asyncio.Condition()  # somebody has been replaced
        self._tasks: list[asyncio.Task[None]] = []
        self._begun = False
        self._replacing: set[tuple[str, int]] = set()
        self.warn: Callable[[str], None] = lambda text: None
        #: What is done, in a thread, before an actor that answers nobody is ended: its stack is written down.
        self.look_at: Callable[[Actor[Any]], None] | None = None
        self.members = Members(epoch)
        self._told = Members()  # the newest that every informed actor has
        #: The error that ends the run.
        self.failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    def add(self, group: Group[Any], on_death: OnDeath, *, informed: bool,
            start: Callable[[Any], Any] | None = None) -> None:
        """Watch the group from now on. Until `begin` any death ends the run.

        `informed`: its actors are told who is alive. `start`: called of one that replaces another, before it is told.
        """
        self._starts[group.role] = start
        self._groups[group.role] = group
        self._policies[group.role] = on_death
        if informed:
            self._informed.add(group.role)
        for index in range(len(group)):
            self._in_background(self._watch(group, index))

    def listen(self, role: str, *, lost: Callable[[int], None], replaced: Callable[[int], None]) -> None:
        """Call `lost` with the index as soon as an actor of the role has died, `replaced` once another serves."""
        self._listeners[role] = lost, replaced

    async def begin(self) -> None:
        """All groups are built: tell the informed ones who is there. From now on policies apply."""
        await self._tell_everybody()
        self._begun = True
        heartbeat = Heartbeat(lambda: [actor for group in self._groups.values() for actor in group
                                       if (group.role, actor.index) not in self._replacing], self._ended_silent)
        if self._heartbeat:
            self._in_background(heartbeat.run())

    def _ended_silent(self, actor: Actor[Any], silent_s: float) -> None:
        why = f"{actor.role} {actor.index}: the process did not answer for {silent_s:.0f} s and was ended"
        self.end_silent(actor.role, actor.index, actor.incarnation, why)

    @property
    def is_whole(self) -> bool:
        """Whether nobody is being replaced."""
        return not self._replacing

    def progress(self) -> None:
        """A step is done: count deaths anew."""
        self._deaths.clear()

    def end_silent(self, role: str, index: int, incarnation: str, why: str) -> None:
        """End the actor, which answers nobody, unless it has been replaced already. Its death counts as any other."""
        actor = self._groups[role][index]
        if actor.incarnation == incarnation and incarnation not in self._silent:
            self._silent[incarnation] = why
            if self.look_at is None:
                actor.kill()
            else:
                self._in_background(self._look_and_kill(actor, self.look_at))

    async def _look_and_kill(self, actor: Actor[Any], look_at: Callable[[Actor[Any]], None]) -> None:
        try:
            await asyncio.to_thread(look_at, actor)
        finally:
            actor.kill()

    async def replaced(self, role: str, index: int, incarnation: str, deadline_s: float) -> None:
        """Waits until another actor has its place, and the informed ones know. TimeoutError after the deadline."""
        async with asyncio.timeout(deadline_s), self._changed:
            await self._changed.wait_for(lambda: self._told.of(role)[index].incarnation != incarnation)

    async def _watch(self, group: Group[object], index: int) -> None:
        """Watch one place in a group, through all its incarnations."""
        while True:
            incarnation = group[index].incarnation
            error = await group.death(index)
            if self.failure.done():
                return  # the run is ending: of Ray's own death, perhaps, after which nobody can be replaced
            if incarnation in self._silent:
                error = ActorDied(self._silent.pop(incarnation), role=group.role, index=index,
                                  log_file=error.log_file)
            self._deaths[group.role] += 1
            if not self._begun or self._policies[group.role] is OnDeath.END_RUN:
                return self.fail(error)
            if self._deaths[group.role] > MOST_DEATHS:
                return self.fail(ActorDied(f"{error}; {MOST_DEATHS} have died since the last step",
                                            role=group.role, index=index))
            self.warn(f"{' '.join(str(error).split())}; another one is started in its place")
            self._replacing.add((group.role, index))
            await self._replace(group, index)
            self._replacing.discard((group.role, index))

    async def _replace(self, group: Group[object], index: int) -> None:
        lost, replaced = self._listeners.get(group.role, (_ignored, _ignored))
        lost(index)
        while True:
            try:
                await group.replace(index, deadline_s=self._start_deadline_s)
                start = self._starts[group.role]
                if start is not None:
                    await group[index].call(start).within(self._start_deadline_s)
                break
            except ActorDied:  # while it started
                self._deaths[group.role] += 1
                if self._deaths[group.role] > MOST_DEATHS:
                    raise
        await self._tell_everybody()
        async with self._changed:
            self._changed.notify_all()
        replaced(index)

    async def _tell_everybody(self) -> None:
        members = Members(self.members.epoch + 1, {role: tuple(group) for role, group in self._groups.items()})
        self.members = members
        await first_failure([self._tell(actor, members) for role in sorted(self._informed)
                             for actor in self._groups[role]])
        self._told = max(self._told, members, key=lambda members: members.epoch)

    async def _tell(self, actor: Actor[Any], members: Members) -> None:
        try:
            await actor.call(Meets.meet, members).within(self._start_deadline_s)
        except ActorDied:
            if not self._begun:
                raise
            # else the actor's own watch sees to it

    def _in_background(self, work: Coroutine[object, object, None]) -> None:
        """For as long as the run lives. What the work raises ends the run."""
        self._tasks.append(in_background(work, self.fail))

    def fail(self, error: Exception) -> None:
        """It ends the run, unless something else did before."""
        if not self.failure.done():
            self.failure.set_result(error)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


def _ignored(index: int) -> None: ...
