"""Which request goes to an engine next, and to which engine.

Takes:  requests: the version they belong to, how many samples, how long they are expected to become.
Gives:  `Dispatch.turn`: an engine, once one has room; `Lengths`, what to expect; `split`, the parts of a group.
Knows:  what is older goes first, then what is expected to be longer: the last to end should be a short one.
Keeps:  the requests that wait, what each engine has, a running mean for each row of the data.
Never:  calls an engine. Who waits here is woken by a request that ends before it; each of those has a deadline.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np

from flux_ray.records import Prompt

NEWEST_SHARE = 0.5  # of a row's expected length that its last group decides
QUEUED_SHARE = 1.0  # of what an engine runs at once: waits there, so that it never runs short between two answers


@dataclass(frozen=True)
class Request:
    """A group, or a part of one.

    >>> Request(born=3, num_samples=8, prompt_tokens=20, response_tokens=50.0).num_tokens
    420
    """

    born: int  # version at which the prompt started; of a spare the next
    num_samples: int
    prompt_tokens: int
    response_tokens: float  # expected, of one sample

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + round(self.num_samples * self.response_tokens)

    @property
    def order(self) -> tuple[float, ...]:
        """The least goes first."""
        return (self.born, -self.response_tokens, -self.prompt_tokens)


class Lengths:
    """Expected tokens of a response, by the row of its prompt: a running mean; of a row not seen yet, that of all.

    Kept in memory alone: it decides who goes first, and never what is sampled.

    >>> lengths = Lengths(longest=100)
    >>> lengths.expected(7); lengths.saw(7, 40.0); lengths.saw(7, 20.0); lengths.expected(7), lengths.expected(8)
    100
    (30.0, 30.0)
    """

    def __init__(self, longest: float) -> None:
        self._of_row: dict[int, float] = {}
        self._of_all: float | None = None
        self._longest = longest

    def expected(self, row: int) -> float:
        return self._of_row.get(row, self._longest if self._of_all is None else self._of_all)

    def saw(self, row: int, tokens: float) -> None:
        """`tokens`: the mean over a group's samples."""
        self._of_row[row] = _moved(self._of_row.get(row), tokens)
        self._of_all = _moved(self._of_all, tokens)


def _moved(mean: float | None, value: float) -> float:
    return value if mean is None else mean + NEWEST_SHARE * (value - mean)


def split(prompt: Prompt, num_parts: int) -> list[Prompt]:
    """The parts of a group, as equal as can be. Sample i keeps its seed, prompt.seed + i: the numbers stay the same.

    >>> [(part.num_samples, part.seed) for part in split(prompt, 2)]   # of five samples, with seed 100
    [(3, 100), (2, 103)]
    """
    num_parts = min(num_parts, prompt.num_samples)
    size, larger = divmod(prompt.num_samples, num_parts)
    counts = [size + (part < larger) for part in range(num_parts)]
    firsts = itertools.accumulate(counts[:-1], initial=0)
    return [replace(prompt, num_samples=n, seed=prompt.seed + i) for n, i in zip(counts, firsts, strict=True)]


class Dispatch:
    """Requests over engines that run `room` sequences each at once.

    Of the engines with room, the one with the fewest tokens outstanding; the lowest index among equals.
    """

    def __init__(self, num_engines: int, *, room: int, queued_share: float = QUEUED_SHARE) -> None:
        self._room = round((1 + queued_share) * room)
        self._samples_E = np.zeros(num_engines, np.int64)
        self._tokens_E = np.zeros(num_engines, np.int64)
        self._waiting: list[tuple[tuple[float, ...], int, Request, asyncio.Future[int]]] = []
        self._numbers = itertools.count()  # among equals the first that asked

    @asynccontextmanager
    async def turn(self, request: Request) -> AsyncIterator[int]:
        """An engine for the request, held until it is done."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[int] = loop.create_future()
        heapq.heappush(self._waiting, (request.order, next(self._numbers), request, turn))
        loop.call_soon(self._start)  # not at once: whoever asks at the same moment is put in order first
        try:
            yield await turn
        finally:
            if turn.done() and not turn.cancelled():
                self._add(turn.result(), request, -1)
                self._start()

    def _start(self) -> None:
        while self._waiting:
            *_, request, turn = self._waiting[0]
            engine = None if turn.done() else self._engine_for(request)
            if engine is None and not turn.done():
                return
            heapq.heappop(self._waiting)
            if engine is not None:  # else it was cancelled while it waited
                self._add(engine, request, 1)
                turn.set_result(engine)

    def _engine_for(self, request: Request) -> int | None:
        has_room_E = (self._samples_E + request.num_samples <= self._room) | (self._samples_E == 0)
        engine = int(np.where(has_room_E, self._tokens_E, np.iinfo(np.int64).max).argmin())
        return engine if has_room_E[engine] else None

    def _add(self, engine: int, request: Request, sign: int) -> None:
        self._samples_E[engine] += sign * request.num_samples
        self._tokens_E[engine] += sign * request.num_tokens
