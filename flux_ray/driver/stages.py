"""The stages of a group before training, as the loop sees them: `generate` starts a group; it ends READY or dropped.

Takes:  news of the rollout workers, which becomes transitions of the ledger. Groups lost with a worker start again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from pathlib import Path

from flux_ray.algo.filters import REWARD_FAILED
from flux_ray.clock import now_s
from flux_ray.cluster.group import Group
from flux_ray.cluster.plan import ROLLOUT
from flux_ray.config import PolicyGradientConfig
from flux_ray.driver.assigning import Assigning
from flux_ray.driver.engines import Engines
from flux_ray.driver.entry import NOBODY, Entry, State
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.second_tries import SecondTries
from flux_ray.driver.workers import Workers
from flux_ray.messages import GroupDropped, GroupFailed, GroupReady, News, PartGenerated, PartLost, RewardWorkerLost
from flux_ray.protocols import RolloutWorker
from flux_ray.records import Prompt


class Stages:
    def __init__(self, config: PolicyGradientConfig, ledger: Ledger, *, workers: Group[RolloutWorker],
                 engines: Engines, warn: Callable[[str, str], None], step: int = 0) -> None:
        """`warn` takes the kind of a warning, and its text. `step`: how many are done."""
        self.log_dir: Path | None = None  # where the actors' own output lies: an error names it
        self._config, self.ledger, self.warn, self.step = config, ledger, warn, step
        supervisor = engines.supervisor
        self.workers = Workers(workers, supervisor)
        self._assigning = Assigning(config.rollout, ledger, self.workers, engines,
                                    max_staleness=config.driver.max_staleness)
        self.generate, self.hold = self._assigning.ask, self._assigning.hold
        self.engines = engines
        engines.on_change = self._on_engines
        self._second_tries = SecondTries(supervisor, self.workers, is_wanted=self._assigning.__contains__,
                                         deadline_s=2 * config.cluster.start_deadline_s)
        self._listening: list[asyncio.Task[None]] = []
        self.changed = asyncio.Event()  # a group is ready or dropped; other engines serve
        self.evaluated: dict[int, asyncio.Future[GroupReady | None]] = {}  # by uid; None: its reward failed
        self.on_free_slot: Callable[[], None] = lambda: None
        supervisor.listen(ROLLOUT, lost=self._lost, replaced=self.workers.replaced)

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """Listen to the workers. What ends the run is raised in one of the tasks."""
        self._listening = [*self.workers.begin(tasks, self._on_news), tasks.create_task(self._second_tries.run())]

    def end(self) -> None:
        """Listen no more."""
        for task in self._listening:
            task.cancel()

    def forget(self, entries: Iterable[Entry]) -> None:
        """Nobody needs these groups any more, whether they run or are finished."""
        for entry in entries:
            if entry.key in self._assigning:  # a refused spare is forgotten already
                self._end(entry)
                if entry.worker != NOBODY:
                    self.workers.forget(entry.worker, entry.key)

    def start_again(self, entries: Iterable[Entry]) -> None:
        """The ledger has put them back to WAITING."""
        for entry in entries:
            self._second_tries.ended((entry.uid, entry.attempt - 1))
            self._assigning.ask_again(entry)

    def _end(self, entry: Entry) -> Prompt:
        self._second_tries.ended(entry.key)
        return self._assigning.end(entry.key, entry.worker).prompt

    def _lost(self, worker: int) -> None:
        self.workers.lost(worker)
        self.start_again(self.ledger.lost(worker))

    def _on_engines(self) -> None:
        self._assigning.serve(self.engines.serving)
        self.changed.set()

    def _on_news(self, worker: int, news: News) -> None:
        key = news.uid, news.attempt
        entry = self.ledger.find(*key)
        if entry is None or key not in self._assigning:  # nobody waits for it any more
            return self.workers.forget(worker, key)
        match news:
            case PartGenerated():
                self._on_part(entry, news)
            case PartLost():
                self._on_part_lost(entry, news)
            case GroupReady():
                self._on_ready(entry, news)
            case GroupDropped():
                self._on_dropped(entry, news)
            case RewardWorkerLost():
                self._on_lost_reward(entry, news)
            case GroupFailed():
                raise news.failure.as_error(ROLLOUT, entry.worker, what=news.what, log_dir=self.log_dir)

    def _on_part(self, entry: Entry, news: PartGenerated) -> None:
        self._assigning.generated(entry, news.seed)
        self.ledger.generated(entry, news.num_tokens, now_s())
        if entry.state is State.GENERATED:
            self._assigning.saw_length(entry)

    def _on_part_lost(self, entry: Entry, news: PartLost) -> None:
        self.engines.end(news.engine, news.why, incarnation=news.incarnation)
        self._assigning.part_lost(entry, news.seed)

    def _on_ready(self, entry: Entry, news: GroupReady) -> None:
        self.ledger.is_ready(entry, news)
        self._second_tries.ended(entry.key)
        if entry.uid < 0:
            self._end(entry)
            self.evaluated.pop(entry.uid).set_result(news)
        self.changed.set()

    def _on_dropped(self, entry: Entry, news: GroupDropped) -> None:
        row = self._end(entry).where
        self.ledger.drop(entry, news.cause, self.step)
        if entry.uid < 0:
            self.warn("evaluation", f"evaluation, {row} left out: {news.why}")
            self.evaluated.pop(entry.uid).set_result(None)
        elif news.why:
            self.warn(news.cause, f"{row} dropped: {news.why}")
        self.changed.set()
        self.on_free_slot()

    def _on_lost_reward(self, entry: Entry, news: RewardWorkerLost) -> None:
        if not self._second_tries.add(entry.worker, news):
            self.workers.forget(entry.worker, entry.key)
            self._on_dropped(entry, GroupDropped(*entry.key, REWARD_FAILED, news.why))
