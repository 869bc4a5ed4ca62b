"""The entries of groups that hold a slot, oldest first, and how many are in each state.

Never:  decides a move: the ledger does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from flux_ray.driver.entry import Entry, State
from flux_ray.driver.staleness import Bound, core_and_spares


class Slots:
    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}  # oldest first
        self.counts: Counter[State] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, uid: int) -> Entry | None:
        return self._entries.get(uid)

    @property
    def untrained(self) -> Iterator[Entry]:
        """Those that are not in training."""
        return (entry for entry in self if entry.state is not State.TRAINING)

    def core_and_spares(self, bound: Bound, step: int) -> tuple[list[Entry], list[Entry]]:
        """Of those that are not in training, where `step` is in training or is trained next."""
        return core_and_spares(self.untrained, bound, step=step, num_training=self.counts[State.TRAINING])

    def add(self, entry: Entry) -> None:
        assert entry.uid not in self._entries, entry.uid
        self._entries[entry.uid] = entry
        self.counts[entry.state] += 1

    def move(self, entry: Entry, state: State) -> None:
        """Groups of evaluations, which have no slot, are moved here too, and not counted."""
        if entry.uid in self._entries:
            self.counts[entry.state] -= 1
            self.counts[state] += 1
        entry.state = state

    def end(self, entries: Iterable[Entry], state: State) -> None:
        """Their slots are free."""
        for entry in list(entries):
            self.counts[entry.state] -= 1
            entry.state = state
            del self._entries[entry.uid]


def ready_tokens(entries: Iterable[Entry]) -> int:
    return sum(entry.total_tokens for entry in entries if entry.is_ready)
