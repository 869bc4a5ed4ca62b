"""Slots and staleness: who may generate, and which groups a step takes. Pure code.

Takes:  prompts' numbers (uids) and the trainer's version at each event.
Gives:  whether another prompt may start, and the groups of the next step, oldest first.
Knows:  slots = (max_staleness + 1) x prompts per step: what is in flight can't grow older than the bound.
Keeps:  a slot from the moment its prompt starts until its group has been trained on and the weights are published.
Never:  waits, and never throws a group away to keep the bound: a group that would pass it is in the next batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Slots:
    """The slots of one run.

    >>> slots = Slots(prompts_per_step=2, max_staleness=0)
    >>> slots.reserve(0, version=0); slots.reserve(1, version=0); slots.free
    0
    >>> slots.ready(1, "group of 1"); slots.take(version=0) is None
    True
    >>> slots.ready(0, "group of 0"); slots.take(version=0)
    ['group of 0', 'group of 1']
    >>> slots.release(); slots.free
    2
    """

    prompts_per_step: int
    max_staleness: int
    _born: dict[int, int] = field(default_factory=dict)  # uid ► version when its prompt started
    _ready: dict[int, Any] = field(default_factory=dict)  # uid ► its finished group
    _taken: set[int] = field(default_factory=set)  # in the step that is being trained

    @property
    def free(self) -> int:
        return (self.max_staleness + 1) * self.prompts_per_step - len(self._born)

    @property
    def in_flight(self) -> list[int]:
        """Prompts that were started and are not trained on yet, oldest first: what a resume must start again."""
        return sorted(self._born)

    def reserve(self, uid: int, *, version: int) -> None:
        assert self.free > 0, "no slot is free"
        assert uid not in self._born, uid
        self._born[uid] = version

    def drop(self, uid: int) -> None:
        """A filter refused the group: its slot is free again."""
        del self._born[uid]

    def ready(self, uid: int, group: Any) -> None:
        assert uid in self._born and uid not in self._taken, uid
        self._ready[uid] = group

    def take(self, *, version: int) -> list[Any] | None:
        """The next step's groups in the order of their prompts; None while it must wait.

        Those born first go first. It waits for `prompts_per_step` of them, and while what it would leave behind could
        not all be trained within the bound.
        """
        waiting = {uid: born for uid, born in self._born.items() if uid not in self._taken}
        chosen = sorted(self._ready, key=lambda uid: (waiting[uid], uid))[: self.prompts_per_step]
        left = [born for uid, born in waiting.items() if uid not in set(chosen)]
        if len(chosen) < self.prompts_per_step or not self._in_time(left, version=version + 1):
            return None
        self._taken = set(chosen)
        return [self._ready.pop(uid) for uid in sorted(chosen)]

    def _in_time(self, born: list[int], *, version: int) -> bool:
        """Whether groups born at these versions can all be trained, one step's worth a version from `version` on."""
        last_versions = sorted(b + self.max_staleness for b in born)
        return all(last >= version + i // self.prompts_per_step for i, last in enumerate(last_versions))

    def release(self) -> None:
        """The step's groups are trained on and the new version is served: their slots are free."""
        for uid in self._taken:
            del self._born[uid]
        self._taken = set()
