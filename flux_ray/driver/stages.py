"""The stages of a group before training, as the loop sees them: `generate` starts one, and it is READY or gone.

Takes:  the ledger's entries with their prompts; news of the rollout workers.
Gives:  each transition to the ledger; the groups of an evaluation.
Knows:  who goes first, on which engine, carried by which worker; what is lost with a worker starts again.
Never:  holds a token that was sampled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from flux_ray.algo.filters import REWARD_FAILED
from flux_ray.clock import now_s
from flux_ray.cluster.group import ActorDied, Group
from flux_ray.cluster.plan import ROLLOUT
from flux_ray.cluster.supervisor import Supervisor
from flux_ray.config import Config
from flux_ray.driver.entry import NOBODY, Entry, State
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.second_tries import SecondTries
from flux_ray.driver.workers import SILENCE_S, Workers
from flux_ray.messages import Assignment, GroupDropped, GroupFailed, GroupReady, News, PartGenerated, RewardWorkerLost
from flux_ray.protocols import RolloutWorker
from flux_ray.records import Prompt
from flux_ray.rollout.dispatch import QUEUED_SHARE, Dispatch, Lengths, Request, split


class Asked(NamedTuple):
    """What a group is made from, as long as it has not ended."""

    prompt: Prompt
    parts: dict[int, Prompt]  # by seed
    priority: int  # the least goes first
    lengths: Lengths
    temperature: float | None  # of an evaluation


class Stages:
    def __init__(self, config: Config, ledger: Ledger, *, workers: Group[RolloutWorker], supervisor: Supervisor,
                 warn: Callable[[str, str], None], step: int = 0) -> None:
        """`warn` is given what kind of thing it was, and a text. `step`: done."""
        self.log_dir: Path | None = None  # where the actors' own output lies, for who is told of a failure
        self._config, self.ledger, self._warn, self.step = config, ledger, warn, step
        self.workers = Workers(workers, supervisor)
        # What still waits in an engine when new weights come would find its prefix as the old ones computed it.
        keeps = config.rollout.kv_after_update == "keep" and config.driver.max_staleness > 0
        self._dispatch: Dispatch[tuple[int, int, int]] = Dispatch(  # uid, attempt, seed of a part
            config.rollout.num_engines, capacity=config.rollout.max_num_seqs,
            queued_share=0.0 if keeps else QUEUED_SHARE)
        self._asked: dict[tuple[int, int], Asked] = {}
        self._evaluated: dict[int, asyncio.Future[GroupReady | None]] = {}
        self._second_tries = SecondTries(supervisor, self.workers, is_wanted=lambda key: key in self._asked,
                                         deadline_s=2 * config.cluster.start_deadline_s)
        self._assigning = False
        self._listening: list[asyncio.Task[None]] = []
        self.changed = asyncio.Event()  # a group is ready or dropped
        self.on_free_slot: Callable[[], None] = lambda: None
        supervisor.listen(ROLLOUT, lost=self._lost, replaced=self.workers.replaced)

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Listen to the workers. What ends the run is raised in one of the tasks."""
        self._listening = [*self.workers.begin(tasks, self._on_news), tasks.create_task(self._second_tries.run())]

    def end(self) -> None:
        """Listen no more."""
        for task in self._listening:
            task.cancel()

    def generate(self, entry: Entry, prompt: Prompt, *, priority: int, lengths: Lengths,
                 temperature: float | None = None) -> None:
        """Carry the group until it is READY or gone. `temperature`: of an evaluation."""
        parts = {part.seed: part for part in split(prompt, self._config.rollout.split_groups)}
        self._ask(entry, Asked(prompt, parts, priority, lengths, temperature))

    async def evaluate(self, prompt: Prompt, *, lengths: Lengths, temperature: float | None) -> GroupReady | None:
        """The prompt's group, scored; None where its reward failed and the run goes on.

        Its calls to actors have their deadlines in the worker.
        """
        num_parts = min(self._config.rollout.split_groups, prompt.num_samples)
        entry = self.ledger.evaluate(-1 - prompt.uid, self.step, num_parts)
        self._evaluated[entry.uid] = asyncio.get_running_loop().create_future()
        self.generate(entry, replace(prompt, uid=entry.uid), priority=self.step, lengths=lengths,
                      temperature=temperature)
        return await self._evaluated[entry.uid]

    def _ask(self, entry: Entry, asked: Asked) -> None:
        """A request for each part; all that are asked for at one moment are put in order before any of them starts."""
        self._asked[entry.key] = asked
        expected = asked.lengths.expected(asked.prompt.row)
        for seed, part in asked.parts.items():
            request = Request(asked.priority, part.num_samples, len(part.token_ids), expected)
            self._dispatch.ask((*entry.key, seed), request)
        self._assign_soon()

    def _assign_soon(self) -> None:
        if not self._assigning:
            self._assigning = True
            asyncio.get_running_loop().call_soon(self._assign)

    def _assign(self) -> None:
        self._assigning = False
        for (uid, attempt, seed), request, engine in self._dispatch.starts():
            entry, asked = self.ledger.find(uid, attempt), self._asked[uid, attempt]
            assert entry is not None, (uid, attempt)
            self.ledger.running(entry, self.workers.choose(), now_s())
            assignment = Assignment(asked.parts[seed], attempt, engine, asked.prompt.num_samples, asked.temperature,
                                    evaluates=uid < 0)
            self.workers.assign(entry.worker, assignment, request.num_tokens)

    def forget(self, entries: Iterable[Entry]) -> None:
        """Nobody needs these groups any more, whether they run or are finished."""
        for entry in entries:
            if entry.key in self._asked:  # a refused spare is forgotten already
                self._end(entry.key)
                if entry.worker != NOBODY:
                    self.workers.forget(entry.worker, entry.key)

    async def text(self, entry: Entry) -> str | None:
        """Of its first response, for people; None where it is lost."""
        try:
            call = self.workers[entry.worker].call(RolloutWorker.texts, [entry.key])
            (text,) = await call.within(SILENCE_S)
        except (ActorDied, TimeoutError):  # who listens to the worker sees to it
            return None
        return text

    def _end(self, key: tuple[int, int]) -> Asked:
        """It has ended at this attempt: whatever it still has on engines is there no more."""
        asked = self._asked.pop(key)
        for seed in asked.parts:
            self._dispatch.done((*key, seed))
        self._second_tries.ended(key)
        self._assign_soon()
        return asked

    def _lost(self, worker: int) -> None:
        """The worker has died: its groups start again."""
        self.workers.lost(worker)
        self.start_again(self.ledger.lost(worker))

    def start_again(self, entries: Iterable[Entry]) -> None:
        """The ledger has put them back to WAITING."""
        for entry in entries:
            self._ask(entry, self._end((entry.uid, entry.attempt - 1)))

    def _on_news(self, worker: int, news: News) -> None:
        key = news.uid, news.attempt
        entry = self.ledger.find(*key)
        if entry is None or key not in self._asked:  # nobody waits for it any more
            return self.workers.forget(worker, key)
        handlers: dict[type, Callable[[int, Entry, Any], None]] = {
            PartGenerated: self._on_part, GroupReady: self._on_ready, GroupDropped: self._on_dropped,
            RewardWorkerLost: self._on_lost_reward, GroupFailed: self._on_failed}
        handlers[type(news)](worker, entry, news)

    def _on_part(self, worker: int, entry: Entry, news: PartGenerated) -> None:
        self.workers.generated(worker, self._dispatch.done((*entry.key, news.seed)))
        self.ledger.generated(entry, news.num_tokens, now_s())
        if entry.state is State.GENERATED:
            prompt, lengths = self._asked[entry.key].prompt, self._asked[entry.key].lengths
            lengths.saw(prompt.row, entry.num_tokens / prompt.num_samples)
        self._assign_soon()

    def _on_ready(self, worker: int, entry: Entry, news: GroupReady) -> None:
        self.ledger.is_ready(entry, news)
        self._second_tries.ended(entry.key)
        if entry.uid < 0:
            self._end(entry.key)
            self._evaluated.pop(entry.uid).set_result(news)
        self.changed.set()

    def _on_dropped(self, worker: int, entry: Entry, news: GroupDropped) -> None:
        row = f"prompt row {self._end(entry.key).prompt.row + 1} (from 1)"
        self.ledger.drop(entry, news.cause, self.step)
        if entry.uid < 0:
            self._warn("evaluation", f"evaluation, {row} left out: {news.why}")
            self._evaluated.pop(entry.uid).set_result(None)
        elif news.why:
            self._warn(news.cause, f"{row} dropped: {news.why}")
        self.changed.set()
        self.on_free_slot()

    def _on_lost_reward(self, worker: int, entry: Entry, news: RewardWorkerLost) -> None:
        if not self._second_tries.add(worker, news):
            self.workers.forget(worker, entry.key)
            self._on_dropped(worker, entry, GroupDropped(*entry.key, REWARD_FAILED, news.why))

    def _on_failed(self, worker: int, entry: Entry, news: GroupFailed) -> None:
        raise news.failure.as_error(ROLLOUT, worker, what=news.what, log_dir=self.log_dir)
