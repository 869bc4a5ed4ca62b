"""Answers many callers at once from one frozen model: those who wait share a forward.

Takes:  a function from several requests to their answers, what a request costs, what a forward may cost.
Gives:  `await ask(request)`: its answer.
Knows:  what arrives while a forward runs waits and goes together, oldest first, up to the budget.
Never:  blocks its event loop: the forward runs in a thread, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Serving(Generic[Request, Answer]):
    """A failed forward fails its callers and no others."""

    def __init__(
        self, forward: Callable[[list[Request]], list[Answer]], *, cost: Callable[[Request], int], max_cost: int,
    ) -> None:
        self._forward, self._cost, self._max_cost = forward, cost, max_cost
        self._waiting: list[tuple[Request, asyncio.Future[Answer]]] = []
        self._server: asyncio.Task[None] | None = None

    async def ask(self, request: Request) -> Answer:
        """Waits for the forwards of its own process only; whoever calls over a network sets the deadline."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, answer))
        if self._server is None or self._server.done():
            self._server = asyncio.create_task(self._serve())
        return await answer

    async def _serve(self) -> None:
        """Forward after forward until nobody waits."""
        try:
            while self._waiting:
                await self._answer(self._take())
        finally:  # nobody is left waiting for a server that was cancelled
            for _, answer in self._waiting:
                answer.cancel()

    async def _answer(self, batch: list[tuple[Request, asyncio.Future[Answer]]]) -> None:
        """One forward for these callers; what it raises is theirs. A caller may have given up meanwhile."""
        try:
            results = await asyncio.to_thread(self._forward, [request for request, _ in batch])
        except BaseException as error:
            failed = error if isinstance(error, Exception) else None
            for answer in (answer for _, answer in batch if not answer.done()):
                answer.set_exception(failed) if failed else answer.cancel()
            if failed is None:
                raise
            return
        for (_, answer), result in zip(batch, results, strict=True):
            if not answer.done():
                answer.set_result(result)

    def _take(self) -> list[tuple[Request, asyncio.Future[Answer]]]:
        """The oldest requests that fit in one forward together; at least one."""
        cost, count = 0, 0
        for request, _ in self._waiting:
            cost += self._cost(request)
            if count and cost > self._max_cost:
                break
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch
