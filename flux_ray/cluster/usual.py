"""Deadlines from what is normal: how long a stage of this run usually takes tells when to wait no longer.

Takes:  a stage's calls, and the longest that the config allows.
Gives:  `Usual.all_within`: their results, as cluster.group.all_within.
Knows:  a step may take much longer than those before it, whose responses were shorter: the bound is generous.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TypeVar

from flux_ray.clock import now_s
from flux_ray.cluster.group import Call, all_within

R = TypeVar("R")

TIMES = 20.0  # a stage that takes so many times the slowest of late is taken for stuck
LEAST_S = 120.0  # no bound is shorter
OF_LATE, ENOUGH = 50, 3  # times that are remembered; so many must be known


class Usual:
    """Of one group of actors.

    >>> usual = Usual(); [usual.saw("train", s) for s in (4.0, 5.0, 9.0)]; usual.bound_s("train", 1800.0)
    180.0
    """

    def __init__(self) -> None:
        self._seen: dict[str, deque[float]] = {}

    def bound_s(self, stage: str, most_s: float) -> float:
        seen = self._seen.get(stage, ())
        return min(most_s, max(LEAST_S, TIMES * max(seen))) if len(seen) >= ENOUGH else most_s

    def saw(self, stage: str, seconds: float) -> None:
        self._seen.setdefault(stage, deque(maxlen=OF_LATE)).append(seconds)

    async def all_within(self, stage: str, calls: Sequence[Call[R]], most_s: float) -> list[R]:
        start_s = now_s()
        results = await all_within(calls, self.bound_s(stage, most_s))
        self.saw(stage, now_s() - start_s)
        return results
