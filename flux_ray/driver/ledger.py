"""The ledger: the state of every group of a run.

Knows:  one method is one transition. A group goes back to WAITING from a dead worker or as surplus, to READY from a
        lost rank. No group is thrown away to keep the bound: the next batch takes those that would pass it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

from flux_ray.accounts import Account
from flux_ray.driver.drop_stats import DropStats
from flux_ray.driver.entry import NOBODY, Entry, State, Taken
from flux_ray.driver.slots import Slots, ready_tokens
from flux_ray.driver.staleness import Bound, chosen
from flux_ray.messages import GroupReady
from flux_ray.records import KeptGroup


class Ledger:
    """Entries that have ended become counts. Groups of an evaluation have negative uids, and no slot."""

    def __init__(self, bound: Bound, drops: DropStats, *, num_parts: int, num_steps: float = math.inf,
                 next_uid: int = 0, unfinished: tuple[int, ...] = ()) -> None:
        self._bound, self.drops = bound, drops
        self._num_parts, self._num_steps = num_parts, num_steps
        self.next_uid = next_uid
        self._queue = [(uid, 0) for uid in unfinished]  # uid and attempt: they start before the next prompt
        self.slots = Slots()  # of all groups but an evaluation's
        self._evaluations: dict[int, Entry] = {}
        self._trained: list[int] = []  # uids, since the last account
        self._dropped: dict[str, list[int]] = defaultdict(list)
        self._awaited: set[int] = set()  # uids; while there are any, the next batch waits for one of them to end

    def find(self, uid: int, attempt: int) -> Entry | None:
        """The group at that attempt; None where it has ended, or has started again."""
        entry = self._evaluations.get(uid) or self.slots.get(uid)
        return entry if entry is not None and entry.attempt == attempt else None

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Prompts that were drawn and are not trained on yet: a resume must start them again."""
        return tuple(sorted([*(entry.uid for entry in self.slots), *(uid for uid, _ in self._queue)]))

    def may_admit(self, step: int) -> bool:
        """Whether another prompt may start when `step` steps are done: in the core, or as a spare."""
        steps_left = self._num_steps - step
        return steps_left > 0 and (
            self._bound.may_start(len(self.slots), step, steps_left)
            or self._bound.may_spare(self.slots.untrained, len(self.slots), self.slots.counts))

    def admit(self, step: int) -> tuple[Entry, bool]:
        """The next prompt gets a slot: WAITING. Gives its entry, and whether it is a spare."""
        assert self.may_admit(step), "no slot is free"
        uid, attempt = self._queue.pop(0) if self._queue else (self.next_uid, 0)
        self.next_uid = max(self.next_uid, uid + 1)
        entry = Entry(uid, attempt, step, self._num_parts)
        self.slots.add(entry)
        return entry, not self._bound.in_time(step, len(self.slots) - 1, step)

    def restore(self, kept: KeptGroup, news: GroupReady, worker: int, now_s: float) -> Entry:
        """A group that an earlier life of the run has finished: READY, in the slot that it had."""
        self._queue.remove((kept.uid, 0))
        entry = Entry(kept.uid, 0, kept.born, self._num_parts, self._num_parts, worker=worker,
                      num_tokens=int(news.scored.num_loss_tokens.sum()), start_s=now_s, end_s=now_s + kept.generate_s)
        self.slots.add(entry)
        self._is_ready(entry, news)
        return entry

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is being made: each group that has a slot is finished, or in training."""
        return not any(self.slots.counts[state] for state in (State.WAITING, State.RUNNING, State.GENERATED))

    def evaluate(self, uid: int, step: int, num_parts: int) -> Entry:
        """A prompt of an evaluation: WAITING, without a slot."""
        self._evaluations[uid] = entry = Entry(uid, 0, step, num_parts)
        return entry

    def running(self, entry: Entry, worker: int, now_s: float, *, engine: int = NOBODY) -> None:
        """A part goes to an engine, carried by the worker: WAITING ► RUNNING with the first part."""
        entry.engine = engine
        if entry.state is State.WAITING:
            self.slots.move(entry, State.RUNNING)
            entry.worker, entry.start_s = worker, now_s

    def generated(self, entry: Entry, num_tokens: int, now_s: float) -> None:
        """A part has come: RUNNING ► GENERATED with the last part."""
        assert entry.state is State.RUNNING, entry
        entry.num_generated += 1
        entry.num_tokens += num_tokens
        entry.end_s = now_s
        if entry.num_generated == entry.num_parts:
            self.slots.move(entry, State.GENERATED)

    def is_ready(self, entry: Entry, news: GroupReady) -> None:
        """GENERATED ► READY. An evaluation's group ends here."""
        assert entry.state is State.GENERATED, entry
        self._is_ready(entry, news)

    def _is_ready(self, entry: Entry, news: GroupReady) -> None:
        self.slots.move(entry, State.READY)
        entry.news, entry.total_tokens = news, int(news.scored.num_tokens.sum())
        if self._evaluations.pop(entry.uid, None):
            return
        self.drops.kept(num_tokens=entry.num_tokens)
        if entry.uid in self._awaited:
            self._awaited = set()

    def drop(self, entry: Entry, cause: str, step: int) -> None:
        """GENERATED, or RUNNING where its rollout failed, ► REFUSED ► DROPPED: the first spare moves up, or the slot is
        free again.

        A spare stays REFUSED until it has moved up: whether it counts must not depend on which group was faster.
        RuntimeError where a step would draw too many prompts.
        """
        assert entry.state in (State.RUNNING, State.GENERATED), entry
        self.slots.move(entry, State.REFUSED)
        entry.cause = cause
        if self._evaluations.pop(entry.uid, None):
            return
        self._awaited, spent = set(), 0
        while gone := [one for one in self.slots.core_and_spares(self._bound, step)[0] if one.state is State.REFUSED]:
            spent += len(gone)
            for one in gone:
                self._dropped[one.cause].append(one.uid)
            self.slots.end(gone, State.DROPPED)
        self.drops.dropped(cause, num_tokens=entry.num_tokens, spent=spent)

    def take(self, step: int, at_least: float = math.inf) -> Taken | None:
        """READY ► TRAINING of groups for this step; None while it must wait.

        It waits for all groups that the step still needs, or for `at_least` so many tokens of them if that comes first:
        a step is then taken in several parts. The groups born first go first. A group is not taken while that would
        leave behind others of the core that could no longer all be trained on in time.
        """
        num_training, num_ready = self.slots.counts[State.TRAINING], self.slots.counts[State.READY]
        needed = self._bound.prompts_per_step - num_training
        enough = num_ready >= needed or (
            at_least < math.inf and ready_tokens(self.slots.untrained) >= at_least)  # asked at each news: O(groups)
        if self._awaited or not enough:
            return None
        core, spares = self.slots.core_and_spares(self._bound, step)
        taken, awaited = chosen(core, self._bound, step=step, num_training=num_training)
        self._awaited = {entry.uid for entry in awaited}
        if len(taken) < needed and ready_tokens(taken) < at_least:
            return None
        for entry in taken:
            self.slots.move(entry, State.TRAINING)
        complete = len(taken) == needed
        surplus = [one for one in spares if complete and not self._bound.in_time(one.born, 0, step + 1)]
        self.drops.surplus(len(surplus), [entry.num_tokens for entry in surplus if entry.is_ready])
        self._queue = [*((entry.uid, entry.attempt + 1) for entry in surplus), *self._queue]
        self.slots.end(surplus, State.WAITING)  # without a slot; their prompts start again, first
        return Taken(taken, complete, surplus)

    def back(self, part: Iterable[Entry]) -> None:
        """TRAINING ► READY: a rank was lost, or hasn't got all arrays, before the part's first collective."""
        for entry in part:
            assert entry.state is State.TRAINING, entry
            self.slots.move(entry, State.READY)

    def trained(self) -> None:
        """TRAINING ► TRAINED: the new version is served, and the slots of the step's groups are free."""
        done = [entry for entry in self.slots if entry.state is State.TRAINING]
        self._trained += [entry.uid for entry in done]
        self.slots.end(done, State.TRAINED)

    def account(self) -> Account:
        """What has become of prompts since the last account."""
        account = Account(self.next_uid, self.unfinished, tuple(self._trained),
                          {cause: tuple(uids) for cause, uids in self._dropped.items()})
        self._trained, self._dropped = [], defaultdict(list)
        return account

    def lost(self, worker: int) -> list[Entry]:
        """The worker has died: its groups are WAITING again, except those that the ranks hold. Gives these groups."""
        carried = [entry for entry in (*self._evaluations.values(), *self.slots.untrained) if entry.worker == worker]
        return self.again([entry for entry in carried if entry.state is not State.REFUSED])

    def again(self, lost: list[Entry]) -> list[Entry]:
        """Back to WAITING, at their places, with the same seeds."""
        for entry in lost:
            if entry.is_ready:
                self.drops.kept(num_tokens=entry.num_tokens, sign=-1)
            self.slots.move(entry, State.WAITING)
            entry.attempt, entry.worker, entry.news = entry.attempt + 1, NOBODY, None
            entry.num_generated = entry.num_tokens = 0
        return lost
