"""Slots and staleness: whose prompt may start, and which groups a step takes. Pure code.

Takes:  prompts' numbers (uids) and the trainer's version at each event.
Gives:  whether another prompt may start; the groups of the next step, oldest first, and the surplus it leaves over.
Knows:  a prompt starts only if its group can be trained on in time, all before it first: that is the whole bound.
Keeps:  a slot from the moment its prompt starts until its group has been trained on and the weights are published.
Never:  waits, and never throws a group away to keep the bound: a group that would pass it is in the next batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Taken:
    """What a step takes."""

    groups: list[Any]  # in the order in which their prompts started
    surplus: list[int]  # over-sampled prompts that can't be trained on in time any more: to stop, and to start again


@dataclass
class Slots:
    """The slots of one run: (max_staleness + 1) x prompts_per_step, and up to `extra` spares.

    A version trains on `prompts_per_step` groups, so the group that stands i-th among those waiting is trained on at
    version + i // prompts_per_step. Those that are in time there are the core. What was over-sampled (`extra`) stands
    behind it and is spare: it moves up when a group of the core is dropped, and is surplus once its time has passed.
    With max_staleness=0 a batch is thereby the first accepted groups in the order of the prompts, whatever `extra` is.

    >>> slots = Slots(prompts_per_step=2, max_staleness=0)
    >>> slots.reserve(0, version=0); slots.reserve(1, version=0); slots.has_room(version=0)
    False
    >>> slots.ready(1, "group of 1"); slots.take(version=0) is None
    True
    >>> slots.ready(0, "group of 0"); slots.take(version=0)
    Taken(groups=['group of 0', 'group of 1'], surplus=[])
    >>> slots.release(); slots.has_room(version=1)
    True
    """

    prompts_per_step: int
    max_staleness: int
    extra: int = 0
    _born: dict[int, int] = field(default_factory=dict)  # uid ► version when its prompt started, oldest first
    _ready: dict[int, Any] = field(default_factory=dict)  # uid ► its finished group
    _refused: set[int] = field(default_factory=set)  # spares that a filter refused: their turn may never come
    _taken: set[int] = field(default_factory=set)  # in the step that is being trained
    _awaited: set[int] = field(default_factory=set)  # the next batch waits for one of these to end, if there are any

    @property
    def in_flight(self) -> list[int]:
        """Prompts that were started and are not trained on yet: what a resume must start again."""
        return sorted(self._born)

    def has_room(self, *, version: int) -> bool:
        """Whether a prompt may start at this version: in the core, or as a spare for what runs there."""
        collecting = version + bool(self._taken)  # the version that trains on the next batch
        if self._in_time(version, len(self._born) - len(self._taken), version=collecting):
            return True
        if not self.extra:
            return False
        core, spare = self._sorted(collecting)
        running = sum(uid not in self._ready for uid in core)
        return self._in_time(version, len(core), version=collecting) or len(spare) < min(self.extra, running)

    def reserve(self, uid: int, *, version: int) -> None:
        assert self.has_room(version=version), "no slot is free"
        assert uid not in self._born, uid
        self._born[uid] = version

    def ready(self, uid: int, group: Any) -> None:
        assert uid in self._born and uid not in self._taken, uid
        self._ready[uid] = group
        if uid in self._awaited:
            self._awaited = set()

    def drop(self, uid: int, *, version: int) -> None:
        """A filter refused the group: the first spare moves up, or its slot is free again.

        A spare stays until it has moved up: whether it counts must not depend on who was faster.
        """
        assert uid in self._born and uid not in self._ready, uid
        self._refused.add(uid)
        self._awaited = set()
        while gone := self._refused & set(self._sorted(version + bool(self._taken))[0]):
            for refused in gone:
                del self._born[refused]
            self._refused -= gone

    def take(self, *, version: int) -> Taken | None:
        """The next step's groups; None while it must wait.

        Those born first go first. It waits for `prompts_per_step` of the core, and while what it would leave of the
        core behind could not all be trained on in time.
        """
        if len(self._ready) < self.prompts_per_step or self._awaited:
            return None
        core, spare = self._sorted(version)
        chosen = [uid for uid in core if uid in self._ready][: self.prompts_per_step]
        left = [self._born[uid] for uid in core if uid not in set(chosen)]
        if len(chosen) < self.prompts_per_step:
            return None
        if not all(self._in_time(born, place, version=version + 1) for place, born in enumerate(left)):
            self._awaited = set(core[: core.index(chosen[-1])]) - set(self._ready)  # whoever else ends changes nothing
            return None
        self._taken = set(chosen)
        surplus = [uid for uid in spare if not self._in_time(self._born[uid], 0, version=version + 1)]
        for uid in surplus:
            del self._born[uid]
            self._ready.pop(uid, None)
        self._refused -= set(surplus)
        return Taken([self._ready.pop(uid) for uid in chosen], surplus)

    def release(self) -> None:
        """The step's groups are trained on and the new version is served: their slots are free."""
        for uid in self._taken:
            del self._born[uid]
        self._taken = set()

    def _in_time(self, born: int, place: int, *, version: int) -> bool:
        """Whether a group with `place` others before it is within the bound when it is its turn."""
        return born + self.max_staleness >= version + place // self.prompts_per_step

    def _sorted(self, version: int) -> tuple[list[int], list[int]]:
        """The core and the spares of what waits, oldest first, where `version` trains on the next batch."""
        core: list[int] = []
        spare: list[int] = []
        for uid, born in self._born.items():
            if uid not in self._taken:
                (core if self._in_time(born, len(core), version=version) else spare).append(uid)
        return core, spare
