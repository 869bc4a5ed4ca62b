"""The rollout workers, as the driver knows them: orders go to them, news comes back.

Takes:  orders as they come, each with the worker that carries it out.
Gives:  `Workers`: many orders go out in one call, much news comes in one answer.
Knows:  an order is sent once the one before has arrived, so that a worker carries them out in order.
Never:  waits for a worker that answers nobody: the supervisor is told of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from flux_ray.clock import now_s
from flux_ray.cluster.group import ActorDied, ActorError, Call, Group
from flux_ray.cluster.plan import ROLLOUT
from flux_ray.cluster.supervisor import Supervisor
from flux_ray.driver.entry import Key
from flux_ray.messages import Assignment, GroupAt, GroupReady, News, Orders, Written
from flux_ray.protocols import RolloutWorker
from flux_ray.records import Prompt

LOOK_EVERY_S = 0.1  # whether the supervisor has seen a death
KEEP_S = 300.0  # until a worker has written its finished groups, or has read them
SILENCE_S = 60.0  # a worker answers within ten seconds, with or without news; after so long a silence it is ended
WRITE_S = 300.0  # for a step's rollouts to be on disk

R = TypeVar("R")


class Workers:
    """The rollout workers by index, through all their incarnations."""

    def __init__(self, workers: Group[RolloutWorker], supervisor: Supervisor) -> None:
        self._workers, self._supervisor = workers, supervisor
        self._orders = [Orders() for _ in workers]  # to be sent
        self._sending: list[asyncio.Task[None] | None] = [None for _ in workers]
        self._tokens = [0 for _ in workers]  # outstanding
        self._serves = [asyncio.Event() for _ in workers]
        self._tasks: asyncio.TaskGroup | None = None
        for serves in self._serves:
            serves.set()

    def __len__(self) -> int:
        return len(self._orders)

    def begin(self, tasks: asyncio.TaskGroup, on_news: Callable[[int, News], None]) -> list[asyncio.Task[None]]:
        """Listen to all of them. What fails there ends `tasks`."""
        self._tasks = tasks
        return [tasks.create_task(self._listen(index, on_news)) for index in range(len(self))]

    def choose(self) -> int:
        """The living worker with the fewest tokens outstanding; where none lives, any worker."""
        return min(range(len(self)), key=lambda i: (not self._serves[i].is_set(), self._tokens[i]))

    def assign(self, index: int, assignment: Assignment, num_tokens: int) -> None:
        """`num_tokens`: expected. They are outstanding until they are `generated`."""
        self._tokens[index] += num_tokens
        self._orders[index].assignments.append(assignment)
        self._send_soon(index)

    def generated(self, index: int, num_tokens: int) -> None:
        self._tokens[index] -= num_tokens

    def forget(self, index: int, key: Key) -> None:
        self._orders[index].forgotten.append(key)
        self._send_soon(index)

    def score_again(self, index: int, key: Key) -> None:
        self._orders[index].scored_again.append(key)
        self._send_soon(index)

    async def probe(self, prompts: Sequence[Prompt], engine: int, deadline_s: float) -> list[GroupAt] | None:
        """A few tokens that the engine samples now, by way of one of the workers; None where that is dead, or dies."""
        if not self._serves[engine % len(self)].is_set():
            return None
        worker = self._workers[engine % len(self)]
        try:
            return await worker.call(RolloutWorker.probe, prompts, engine).within(deadline_s)
        except ActorDied:
            return None

    async def all_serve(self) -> None:
        """Waits until all that were lost are replaced. The supervisor ends the run where one can't be."""
        for serves in self._serves:
            await serves.wait()

    async def text(self, index: int, key: Key) -> str | None:
        """The text of the group's first response, for people; None where it is lost."""
        try:
            (text,) = await self._workers[index].call(RolloutWorker.texts, [key]).within(SILENCE_S)
        except (ActorDied, TimeoutError):  # `_listen` meets the same, and sees to it
            return None
        return text

    async def keep(self, index: int, keys: Sequence[Key], file: Path) -> list[Key]:
        """Has the worker write these groups; those that it has written: none where it fails."""
        try:
            return await self._workers[index].call(RolloutWorker.keep, keys, str(file)).within(KEEP_S)
        except (ActorError, TimeoutError):  # they are sampled again
            return []

    async def bring(self, index: int, file: Path, prompts: Sequence[Prompt]) -> list[GroupReady]:
        """Has the worker own the groups of these prompts that the file has."""
        return await self._workers[index].call(RolloutWorker.bring, str(file), prompts).within(KEEP_S)

    async def write_rollouts(self, step: int) -> list[Written]:
        """Every worker's part of a step; that of a lost worker is lost."""
        async def written(index: int) -> Written:
            try:
                return await self._workers[index].call(RolloutWorker.write_rollouts, step).within(WRITE_S)
            except (ActorDied, TimeoutError):
                return Written(0)

        serving = [index for index, serves in enumerate(self._serves) if serves.is_set()]
        return list(await asyncio.gather(*map(written, serving)))

    def lost(self, index: int) -> None:
        """Forget its orders. New ones wait until another worker serves."""
        self._serves[index].clear()
        self._orders[index], self._tokens[index] = Orders(), 0

    def replaced(self, index: int) -> None:
        self._serves[index].set()
        self._send_soon(index)

    def _send_soon(self, index: int) -> None:
        if self._sending[index] is None and self._serves[index].is_set():
            assert self._tasks is not None, "nobody listens yet"
            self._sending[index] = self._tasks.create_task(self._send(index))

    async def _send(self, index: int) -> None:
        try:
            while self._orders[index] and self._serves[index].is_set():
                orders, self._orders[index] = self._orders[index], Orders()
                await self._answered(index, self._workers[index].call(RolloutWorker.order, orders))
        finally:
            self._sending[index] = None

    async def _listen(self, index: int, on_news: Callable[[int, News], None]) -> None:
        while True:
            await self._serves[index].wait()
            for news in await self._answered(index, self._workers[index].call(RolloutWorker.news)) or ():
                on_news(index, news)

    async def _answered(self, index: int, call: Call[R]) -> R | None:
        """The worker's answer; None where it has died, or was silent and is ended, once `lost` was called."""
        worker = self._workers[index]
        try:
            return await call.within(SILENCE_S)
        except TimeoutError:
            why = f"rollout {index} did not answer for {SILENCE_S:g} s and was ended"
            self._supervisor.end_silent(ROLLOUT, index, worker.incarnation, why)
        except ActorDied:
            pass
        await self._told_of_death(index, worker.incarnation)
        return None

    async def _told_of_death(self, index: int, incarnation: str) -> None:
        """Waits until the supervisor has seen the death, a moment after the caller: nobody asks a dead worker again."""
        ends_s = now_s() + SILENCE_S
        while self._serves[index].is_set() and self._workers[index].incarnation == incarnation:
            if now_s() > ends_s:
                raise TimeoutError(f"rollout {index} answers nobody, and nobody has told of its death")
            await asyncio.sleep(LOOK_EVERY_S)
