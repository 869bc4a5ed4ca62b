"""Slots and staleness: whose prompt may start, and which groups a step takes. Pure code.

Takes:  prompts' numbers (uids) and the trainer's version at each event.
Gives:  whether another prompt may start; the groups of a step, at once or as they come, and the surplus it leaves over.
Knows:  a prompt starts only if its group can be trained on in time, all before it first: that is the whole bound; and
        only if a step is left for it.
Keeps:  a slot from the moment its prompt starts until its group has been trained on and the weights are published.
Never:  waits, and never throws a group away to keep the bound: a group that would pass it is in the next batch.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Taken:
    """What a step takes: all of it, or some while others still run."""

    groups: list[Any]  # in the order in which their prompts started
    complete: bool  # the step has all its groups
    surplus: list[int]  # over-sampled prompts that can't be trained on in time any more: to stop, and to start again
    unused: list[Any]  # groups of those, where they are finished


@dataclass
class Slots:
    """The slots of one run: (max_staleness + 1) x prompts_per_step, and spares.

    A version trains on `prompts_per_step` groups, so the group that stands i-th among those waiting is trained on at
    version + i // prompts_per_step. Those that are in time there are the core. What was over-sampled stands behind it
    and is spare: it moves up when a group of the core is dropped, and is surplus once the batch is full. There are
    `oversample` running spares for each group that may yet be dropped and for which none is finished. A batch is
    thereby the first accepted groups in the order of the prompts, whatever `oversample` is. With max_staleness > 0
    there are none: groups of the next batches, in flight anyway, stand in, and a spare beyond them could only pass the
    bound or be thrown away.

    >>> slots = Slots(prompts_per_step=2, max_staleness=0)
    >>> slots.reserve(0, version=0), slots.reserve(1, version=0), slots.has_room(version=0)
    (False, False, False)
    >>> slots.ready(1, "group of 1"); slots.take(version=0) is None
    True
    >>> slots.ready(0, "group of 0"); slots.take(version=0)
    Taken(groups=['group of 0', 'group of 1'], complete=True, surplus=[], unused=[])
    >>> slots.release(); slots.has_room(version=1)
    True
    """

    prompts_per_step: int
    max_staleness: int
    oversample: float = 0.0
    num_steps: float = math.inf  # of the run: after the last one nothing is trained on
    _born: dict[int, int] = field(default_factory=dict)  # uid ► version when its prompt started, oldest first
    _ready: dict[int, Any] = field(default_factory=dict)  # uid ► its finished group
    _sizes: dict[int, int] = field(default_factory=dict)  # uid ► tokens of that
    _refused: set[int] = field(default_factory=set)  # spares that a filter refused: their turn may never come
    _taken: set[int] = field(default_factory=set)  # in the step that is being trained
    _awaited: set[int] = field(default_factory=set)  # the next batch waits for one of these to end, if there are any

    @property
    def in_flight(self) -> list[int]:
        """Prompts that were started and are not trained on yet: what a resume must start again."""
        return sorted(self._born)

    def has_room(self, *, version: int) -> bool:
        """Whether a prompt may start at this version: in the core, or as a spare for what runs there."""
        left = self.num_steps - version
        if left <= 0:
            return False
        if len(self._born) < left * self.prompts_per_step and self._in_time(version, len(self._born), version):
            return True
        if self.max_staleness or not self.oversample:
            return False
        # Counted without going over the spares, which may be many: this is asked once for each of them.
        untrained = (uid for uid in self._born if uid not in self._taken)
        core = list(itertools.islice(untrained, self.prompts_per_step - len(self._taken)))
        running = sum(uid not in self._ready for uid in core)
        finished = len(self._ready) - (len(core) - running)  # spares, each of which stands in for one for certain
        spares = len(self._born) - len(self._taken) - len(self._ready) - len(self._refused) - running  # that run
        return spares < math.ceil(self.oversample * max(0, running - finished))

    def reserve(self, uid: int, *, version: int) -> bool:
        """Whether it is a spare."""
        assert self.has_room(version=version), "no slot is free"
        assert uid not in self._born, uid
        self._born[uid] = version
        return not self._in_time(version, len(self._born) - 1, version)

    def ready(self, uid: int, group: Any, *, num_tokens: int = 0) -> None:
        assert uid in self._born and uid not in self._taken, uid
        self._ready[uid], self._sizes[uid] = group, num_tokens
        if uid in self._awaited:
            self._awaited = set()

    def drop(self, uid: int, *, version: int) -> int:
        """A filter refused the group: the first spare moves up, or its slot is free again.

        A spare stays until it has moved up: whether it counts must not depend on who was faster. Gives how many count
        now, this one or others that were refused before.
        """
        assert uid in self._born and uid not in self._ready, uid
        self._refused.add(uid)
        self._awaited = set()
        count = 0
        while gone := self._refused & set(self._sorted(version)[0]):
            for refused in gone:
                del self._born[refused]
            self._refused -= gone
            count += len(gone)
        return count

    def take(self, *, version: int, at_least: float = math.inf) -> Taken | None:
        """Groups for this version's step; None while it must wait.

        It waits for all that the step still needs, or for `at_least` so many tokens of them, if that comes first; a
        step is then taken in several parts. Those born first go first. None is taken of the core while that would
        leave others of it behind that could no longer all be trained on in time.
        """
        needed = self.prompts_per_step - len(self._taken)
        if self._awaited or (len(self._ready) < needed and sum(self._sizes.values()) < at_least):
            return None
        core, spare = self._sorted(version)
        chosen = self._chosen(core, needed, version)
        if len(chosen) < needed and sum(self._sizes[uid] for uid in chosen) < at_least:
            return None
        complete = len(chosen) == needed
        self._taken |= set(chosen)
        surplus = [uid for uid in spare if not self._in_time(self._born[uid], 0, version + 1)] if complete else []
        groups, unused = ([self._ready[uid] for uid in uids if uid in self._ready] for uids in (chosen, surplus))
        for uid in (*chosen, *surplus):
            self._ready.pop(uid, None)
            self._sizes.pop(uid, None)
        for uid in surplus:
            del self._born[uid]
        self._refused -= set(surplus)
        return Taken(groups, complete, surplus, unused)

    def _chosen(self, core: list[int], needed: int, version: int) -> list[int]:
        """The first `needed` of the core that are ready and that those before them, if any, can wait for."""
        chosen: list[int] = []
        passed: list[int] = []
        most = math.inf  # groups that those passed over can let go before them
        for uid in core:
            if len(chosen) == needed:
                break
            if uid in self._ready and len(chosen) < most:
                chosen.append(uid)
                continue
            place = len(self._taken) + len(passed)
            passed.append(uid)
            steps = self._born[uid] + self.max_staleness - version + 1  # until its time has passed
            most = min(most, steps * self.prompts_per_step - 1 - place)
        if len(chosen) < needed and len(chosen) >= most:
            self._awaited = set(passed) - set(self._ready)  # whoever else ends changes nothing
        return chosen

    def release(self) -> None:
        """The step's groups are trained on and the new version is served: their slots are free."""
        for uid in self._taken:
            del self._born[uid]
        self._taken = set()

    def _in_time(self, born: int, place: int, version: int) -> bool:
        """Whether a group with `place` others before it, those in training too, is within the bound when it is its
        turn."""
        return born + self.max_staleness >= version + place // self.prompts_per_step

    def _sorted(self, version: int) -> tuple[list[int], list[int]]:
        """The core and the spares of what waits, oldest first, where `version` is in training or trains next."""
        core: list[int] = []
        spare: list[int] = []
        for uid, born in self._born.items():
            if uid not in self._taken:
                (core if self._in_time(born, len(self._taken) + len(core), version) else spare).append(uid)
        return core, spare
