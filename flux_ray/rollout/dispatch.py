"""Chooses which request goes to an engine next, and to which engine.

Takes:  requests: the version they belong to, how many samples, how long they are expected to become.
Gives:  `Dispatch`: an engine for each, once one has capacity; `Lengths`, what to expect; `split`, a group's parts.
Knows:  older requests go first, then those expected to be longer: the last to end should be a short one.
Keeps:  the requests that wait, what each engine has, a running mean for each row of the data.
Never:  calls an engine, or waits.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from flux_ray.records import Prompt

Key = TypeVar("Key", bound=Hashable)

NEWEST_SHARE = 0.5  # of a row's expected length is decided by its last group
QUEUED_SHARE = 1.0  # of what an engine runs at once waits there too, so that it never runs short of work


@dataclass(frozen=True)
class Request:
    """A group, or a part of one.

    >>> Request(born=3, num_samples=8, prompt_tokens=20, response_tokens=50.0).num_tokens
    420
    """

    born: int  # steps done when the prompt started; of a spare one more
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
    """Expected tokens of a response: a running mean of its prompt's row; for a row not seen yet, the mean of all rows.

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


class Dispatch(Generic[Key]):
    """Requests over engines that run `capacity` sequences each at once.

    Of the engines with capacity, the one with the fewest tokens outstanding; the lowest index among equals.
    """

    def __init__(self, num_engines: int, *, capacity: int, queued_share: float = QUEUED_SHARE) -> None:
        self._capacity = round((1 + queued_share) * capacity)
        self._samples_E = np.zeros(num_engines, np.int64)
        self._tokens_E = np.zeros(num_engines, np.int64)
        self._serves_E = np.ones(num_engines, bool)
        self._waiting: list[tuple[tuple[float, ...], int, Key]] = []
        self._requests: dict[Key, Request] = {}  # waiting or running
        self._engine_of: dict[Key, int] = {}  # of running requests
        self._numbers = itertools.count()  # among equals the first that asked

    def serve(self, engines: Collection[int]) -> None:
        """These alone get requests from now on. What the others run is to be given up, or done."""
        self._serves_E[:] = False
        self._serves_E[list(engines)] = True

    def ask_again(self, key: Key) -> int:
        """The request's engine is gone: it waits for another, at its place in the order. Gives its expected tokens."""
        request = self._requests[key]
        num_tokens = self.done(key)
        self.ask(key, request)
        return num_tokens

    def ask(self, key: Key, request: Request) -> None:
        """The request waits until `starts` gives it an engine."""
        assert key not in self._requests, key
        self._requests[key] = request
        heapq.heappush(self._waiting, (request.order, next(self._numbers), key))

    def starts(self) -> Iterator[tuple[Key, Request, int]]:
        """The requests that may go now, in order, each with its engine. Call it once all of one moment have asked."""
        while self._waiting:
            *_, key = self._waiting[0]
            if key not in self._requests:  # it was given up while it waited
                heapq.heappop(self._waiting)
                continue
            engine = self._engine_for(self._requests[key])
            if engine is None:
                return
            heapq.heappop(self._waiting)
            self._engine_of[key] = engine
            self._add(engine, self._requests[key], 1)
            yield key, self._requests[key], engine

    def done(self, key: Key) -> int:
        """The request has left its engine, or is given up. Gives its expected tokens if it ran; 0 the second time."""
        request, engine = self._requests.pop(key, None), self._engine_of.pop(key, None)
        if request is None or engine is None:
            return 0
        self._add(engine, request, -1)
        return request.num_tokens

    def _engine_for(self, request: Request) -> int | None:
        fits_E = (self._samples_E + request.num_samples <= self._capacity) | (self._samples_E == 0)
        fits_E &= self._serves_E
        engine = int(np.where(fits_E, self._tokens_E, np.iinfo(np.int64).max).argmin())
        return engine if fits_E[engine] else None

    def _add(self, engine: int, request: Request, sign: int) -> None:
        self._samples_E[engine] += sign * request.num_samples
        self._tokens_E[engine] += sign * request.num_tokens
