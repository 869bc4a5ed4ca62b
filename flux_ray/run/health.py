"""Tells of a metric that has left its healthy range.

Takes:  the metrics of each step; the ranges that stand beside the code that computes them.
Gives:  `Health.after`: one warning an episode, which says what to do and names the page.
Knows:  an episode begins when a metric was outside for its `steps` steps in a row, and ends at the first step inside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flux_ray.observability.described import Described, Range, plain
from flux_ray.run import catalogue

PAGE = "docs/metrics.md"


class Health:
    """Of one life of a run."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._outside: dict[str, int] = {}  # metric ► steps in a row
        self._watched = [(one, one.healthy) for one in catalogue.ALL if isinstance(one.healthy, Range)]

    def after(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step`: how many are done. A metric that wasn't measured in this step neither begins nor ends an episode."""
        for one, healthy in self._watched:
            value = metrics.get(one.name)
            if value is None:
                continue
            count = 0 if healthy.holds(value) else self._outside.get(one.name, 0) + 1
            self._outside[one.name] = count
            if count == healthy.steps:
                self._warn(_told(step, value, one, healthy))


def _told(step: int, value: float, one: Described, healthy: Range) -> str:
    return (f"step {step}: {one.name} is {value:.3g}, {healthy.missed_by(value)} for {healthy.steps} steps in a row: "
            f"{plain(one.otherwise)} ({PAGE}, {catalogue.heading_of(one)})")
