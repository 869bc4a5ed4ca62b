"""Chooses the engine that samples each part of a group, and the worker that carries the group.

Takes:  the ledger's entries that are WAITING, each with its prompt.
Gives:  assignments to the workers, as engines have capacity.
Knows:  all groups that are asked for at one moment are put in order before any of them starts.
Keeps:  what each group is made from, until the group ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import NamedTuple

from flux_ray.clock import now_s
from flux_ray.config import RolloutConfig
from flux_ray.driver.engines import Engines
from flux_ray.driver.entry import NOBODY, Entry, Key
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.workers import Workers
from flux_ray.messages import Assignment
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import QUEUED_SHARE, Dispatch, Lengths, Request, split


class Asked(NamedTuple):
    """What a group is made from."""

    prompt: Prompt
    parts: dict[int, Prompt]  # by seed
    priority: int  # the least goes first
    lengths: Lengths
    temperature: float | None  # of an evaluation


class Assigning:
    def __init__(self, config: RolloutConfig, ledger: Ledger, workers: Workers, engines: Engines, *,
                 max_staleness: int) -> None:
        self._ledger, self._workers, self._engines = ledger, workers, engines
        self._num_parts = config.split_groups
        # A request that still waits in an engine when new weights come would find its prefix computed by the old ones.
        keeps = config.kv_after_update == "keep" and max_staleness > 0
        self._dispatch: Dispatch[tuple[int, int, int]] = Dispatch(  # uid, attempt, seed of a part
            config.num_engines, capacity=config.max_num_seqs,
            queued_share=0.0 if keeps else QUEUED_SHARE)
        self._asked: dict[Key, Asked] = {}
        self._due = False

    def __contains__(self, key: Key) -> bool:
        """Whether the group at that attempt has not ended."""
        return key in self._asked

    def ask(self, entry: Entry, prompt: Prompt, *, priority: int, lengths: Lengths,
            temperature: float | None = None) -> None:
        """The group is to be made. `temperature`: of an evaluation."""
        parts = {part.seed: part for part in split(prompt, self._num_parts)}
        self._ask(entry, Asked(prompt, parts, priority, lengths, temperature))

    def hold(self, entry: Entry, prompt: Prompt, *, lengths: Lengths) -> None:
        """As `ask`, of a group that is finished already: it is made only if it is lost."""
        parts = {part.seed: part for part in split(prompt, self._num_parts)}
        self._asked[entry.key] = Asked(prompt, parts, entry.born, lengths, None)

    def ask_again(self, entry: Entry) -> None:
        """The ledger has put it back to WAITING, for its next attempt."""
        self._ask(entry, self.end((entry.uid, entry.attempt - 1)))

    def generated(self, entry: Entry, seed: int) -> None:
        """A part has left its engine, which has capacity for another."""
        self._workers.generated(entry.worker, self._dispatch.done((*entry.key, seed)))
        self._assign_soon()

    def part_lost(self, entry: Entry, seed: int) -> None:
        """A part's engine is gone. Another one samples it, with the same seeds."""
        self._workers.generated(entry.worker, self._dispatch.ask_again((*entry.key, seed)))
        self._assign_soon()

    def serve(self, engines: Collection[int]) -> None:
        """These alone are assigned to from now on."""
        self._dispatch.serve(engines)
        self._assign_soon()

    def saw_length(self, entry: Entry) -> None:
        """All parts are there: their length is what to expect of the next group of that row."""
        asked = self._asked[entry.key]
        asked.lengths.saw(asked.prompt.row, entry.num_tokens / asked.prompt.num_samples)

    def end(self, key: Key, worker: int = NOBODY) -> Asked:
        """The group has ended at that attempt. Its engines, and the worker, have capacity for others."""
        asked = self._asked.pop(key)
        num_tokens = sum(self._dispatch.done((*key, seed)) for seed in asked.parts)
        if worker != NOBODY:
            self._workers.generated(worker, num_tokens)
        self._assign_soon()
        return asked

    def _ask(self, entry: Entry, asked: Asked) -> None:
        self._asked[entry.key] = asked
        expected = asked.lengths.expected(asked.prompt.row)
        for seed, part in asked.parts.items():
            request = Request(asked.priority, part.num_samples, len(part.token_ids), expected)
            self._dispatch.ask((*entry.key, seed), request)
        self._assign_soon()

    def _assign_soon(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._assign)

    def _assign(self) -> None:
        self._due = False
        for (uid, attempt, seed), request, engine in self._dispatch.starts():
            entry, asked = self._ledger.find(uid, attempt), self._asked[uid, attempt]
            assert entry is not None, (uid, attempt)
            self._ledger.running(entry, self._workers.choose(), now_s(), engine=engine)
            assignment = Assignment(asked.parts[seed], attempt, engine, asked.prompt.num_samples, asked.temperature,
                                    evaluates=uid < 0, incarnation=self._engines.incarnation(engine))
            self._workers.assign(entry.worker, assignment, request.num_tokens)
