"""Second tries: groups whose reward worker was lost are scored again, one at a time over all workers.

Takes:  news of lost reward workers.
Gives:  orders to score a group again, once a new reward worker serves.
Knows:  every group that waited in the worker was lost with it, and all but one are innocent. One at a time shows which:
        a group that was alone in a worker that was lost is guilty.
Never:  gives a guilty group another try.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flux_ray.cluster.plan import REWARD
from flux_ray.cluster.supervisor import Supervisor
from flux_ray.driver.entry import Key
from flux_ray.driver.workers import Workers
from flux_ray.messages import RewardWorkerLost


class SecondTries:
    def __init__(self, supervisor: Supervisor, workers: Workers, *, deadline_s: float,
                 is_wanted: Callable[[Key], bool]) -> None:
        """`deadline_s`: for a new reward worker to serve. `is_wanted`: whether the group still runs."""
        self._supervisor, self._workers, self._deadline_s = supervisor, workers, deadline_s
        self._is_wanted = is_wanted
        self._waiting: asyncio.Queue[tuple[int, RewardWorkerLost]] = asyncio.Queue()
        self._tried: dict[Key, asyncio.Event] = {}  # at most one, set when its try has ended

    def add(self, worker: int, news: RewardWorkerLost) -> bool:
        """Whether the group has another try."""
        if news.silent:
            self._supervisor.end_silent(REWARD, news.reward_worker, news.incarnation, news.why)
        self.ended((news.uid, news.attempt))
        if not news.guilty:
            self._waiting.put_nowait((worker, news))
        return not news.guilty

    def ended(self, key: Key) -> None:
        """The group is scored or dropped, or nobody needs it."""
        if key in self._tried:
            self._tried[key].set()

    async def run(self) -> None:
        """Never returns. A group's scoring has its deadline in the rollout worker."""
        while True:
            worker, news = await self._waiting.get()
            await self._supervisor.replaced(REWARD, news.reward_worker, news.incarnation, self._deadline_s)
            key = news.uid, news.attempt
            if self._is_wanted(key):
                self._tried[key] = asyncio.Event()
                self._workers.score_again(worker, key)
                await self._tried[key].wait()
                del self._tried[key]
