"""Lets the calls of one process to one actor travel together: a Ray call costs either side a millisecond of CPU time.

Takes:  calls as they are made; the actor's way to carry one out.
Gives:  `Line`, the caller's end, whose calls are Calls; `Desk`, the actor's end.
Knows:  an exchange takes along all calls made since the last one, and brings back all answers that are there. While an
        answer is awaited, an exchange is on its way or about to begin; a newer exchange lets the older one return.
Never:  carries a call out twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from flux_ray.cluster.group import CallFailed

BATCHING_WINDOW_S = 0.005  # an answer waits so long for others, and the next exchange for calls

Answer = tuple[int, bool, object]  # number of the call; whether it failed; result, or CallFailed


class Sent(NamedTuple):
    """A call on its way. Numbers are the caller's."""

    number: int
    method: str
    args: tuple[object, ...]
    kwargs: dict[str, object]


@dataclass
class Desk:
    """`do` carries out one call: it returns, or raises CallFailed."""

    do: Callable[[str, tuple[object, ...], dict[str, object]], Awaitable[object]]
    _tasks: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    _answers: list[Answer] = field(default_factory=list)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _exchanges: int = 0
    _waiting: int = 0
    _ended_early: set[int] = field(default_factory=set)  # given up by an exchange that overtook the calls' own

    @property
    def is_idle(self) -> bool:
        """Whether nothing would be lost with it: no call, no answer, no word that a call to come is given up."""
        return not (self._tasks or self._answers or self._waiting or self._ended_early)

    async def exchange(self, calls: Sequence[Sent], given_up: Sequence[int]) -> list[Answer]:
        """Begin `calls`, cancel `given_up`. Gives all answers that are there, as soon as there is any."""
        self._exchanges += 1
        this = self._exchanges
        self._changed.set()  # for the one before
        for call in calls:
            if call.number in self._ended_early:
                self._ended_early.remove(call.number)
            else:
                self._tasks[call.number] = asyncio.create_task(self._answer(call))
        for number in given_up:
            self._end(number)
        self._waiting += 1
        try:
            while self._tasks and not self._answers and this == self._exchanges:
                self._changed.clear()
                await self._changed.wait()
            if self._tasks and self._answers:
                await asyncio.sleep(BATCHING_WINDOW_S)
        finally:
            self._waiting -= 1
        answers, self._answers = self._answers, []
        return answers

    def _end(self, number: int) -> None:
        self._answers = [answer for answer in self._answers if answer[0] != number]
        task = self._tasks.pop(number, None)
        if task is not None:
            task.cancel()
        else:  # not begun yet, or its answer has left
            self._ended_early.add(number)

    async def _answer(self, call: Sent) -> None:
        try:
            answer = call.number, False, await self.do(call.method, call.args, call.kwargs)
        except BaseException as error:  # also a cancellation by somebody on this side: the caller must learn of it
            answer = call.number, True, CallFailed.of(error)
        if self._tasks.pop(call.number, None) is not None:  # else the caller has given it up
            self._answers.append(answer)
            self._changed.set()


class Lost(Exception):
    """The actor is gone; `__cause__` says how."""


class Remote(Protocol):
    """The actor that a line leads to: says in readable words what became of a call."""

    def died(self, error: BaseException, when: str) -> Exception: ...

    def failed(self, cause: BaseException, what: str) -> Exception: ...

    def late(self, what: str, deadline_s: float) -> TimeoutError: ...


class Line:
    def __init__(self, actor: Remote, exchange: Callable[[list[Sent], list[int]], Awaitable[list[Answer]]]) -> None:
        """`exchange` is the actor's Desk.exchange. An error of it ends all calls; Lost ends all later ones too."""
        self._actor, self._exchange = actor, exchange
        self._waiting: dict[int, asyncio.Future[object]] = {}  # by the calls' numbers
        self._calls: list[Sent] = []  # for the next exchange
        self._given_up: list[int] = []
        self._number = 0
        self._due: tuple[float, asyncio.Handle] | None = None  # when the next exchange begins
        self._failure: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_the_way = 0  # exchanges

    def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> LineCall:
        self._number += 1
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        if self._failure is not None:
            future.set_exception(self._failure)
            return LineCall(self._actor, self, self._number, method, future)
        self._waiting[self._number] = future
        self._calls.append(Sent(self._number, method, args, kwargs))
        self._exchange_after(0.0)
        return LineCall(self._actor, self, self._number, method, future)

    def give_up(self, number: int) -> None:
        """Nobody waits for that call any more."""
        if self._waiting.pop(number, None) is None:
            return
        unsent = [call for call in self._calls if call.number != number]
        if len(unsent) == len(self._calls):
            self._given_up.append(number)
            self._exchange_after(BATCHING_WINDOW_S)
        self._calls = unsent

    def _exchange_after(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        at_s = loop.time() + seconds
        if self._due is not None:
            if self._due[0] <= at_s:
                return
            self._due[1].cancel()
        self._due = at_s, loop.call_later(seconds, self._begin)

    def _begin(self) -> None:
        self._due = None
        task = asyncio.get_running_loop().create_task(self._once())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _once(self) -> None:
        calls, given_up = self._calls, self._given_up
        self._calls, self._given_up = [], []
        self._on_the_way += 1
        try:
            answers = await self._exchange(calls, given_up)
        except Exception as error:
            return self._fail(error)
        finally:
            self._on_the_way -= 1
        for number, failed, value in answers:
            future = self._waiting.pop(number, None)
            if future is not None and not future.done():
                _settle(future, value, failed=failed)
        if self._waiting and not self._on_the_way:
            self._exchange_after(BATCHING_WINDOW_S)

    def _fail(self, error: Exception) -> None:
        if isinstance(error, Lost):
            self._failure = error
        waiting, self._waiting, self._calls = self._waiting, {}, []
        for future in waiting.values():
            if not future.done():
                future.set_exception(error)


def _settle(future: asyncio.Future[object], value: object, *, failed: bool) -> None:
    if failed:
        assert isinstance(value, CallFailed), value
        future.set_exception(value)
    else:
        future.set_result(value)


@dataclass(frozen=True)
class LineCall:
    """A Call."""

    actor: Remote
    line: Line
    number: int
    method: str
    future: asyncio.Future[object]

    async def within(self, deadline_s: float, *, what: str | None = None) -> Any:
        what = what or self.method
        try:
            async with asyncio.timeout(deadline_s) as limit:
                return await self.future
        except CallFailed as failure:
            raise self.actor.failed(failure, what) from failure
        except Lost as lost:
            assert lost.__cause__ is not None
            raise self.actor.died(lost.__cause__, f" during {what}") from lost.__cause__
        except (asyncio.CancelledError, TimeoutError):
            self.cancel()
            if limit.expired():
                raise self.actor.late(what, deadline_s) from None
            raise

    def cancel(self) -> None:
        self.future.cancel()
        self.line.give_up(self.number)
