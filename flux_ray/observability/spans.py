"""Where the time of a step went: spans by stage and actor.

Takes:  what was done from when to when, on one clock.
Gives:  `Span`; `Phases`, which times what the driver does; `where_time_went`, one line; `chrome_trace`, for
        chrome://tracing and ui.perfetto.dev.
Knows:  groups overlap on one actor: each gets a lane of its own there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

DRIVER = "driver"
WAIT, GENERATE, WRITE = "wait for groups", "generate", "write texts and rollouts"
TAIL_SHARE = 0.8  # once so many of the batch's groups are sampled, the rest is the tail


@dataclass(frozen=True)
class Span:
    name: str
    actor: str  # driver, trainer, engine 0, …
    start_s: float
    end_s: float
    told: Mapping[str, int | float | str] = field(default_factory=dict)  # what a person sees of it

    def within(self, start_s: float, end_s: float) -> float:
        """Seconds of it between the two."""
        return max(min(self.end_s, end_s) - max(self.start_s, start_s), 0.0)


class Phases:
    """Of one step."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.spans: list[Span] = []
        self._clock = clock

    @contextlib.contextmanager
    def during(self, name: str, actor: str = DRIVER) -> Iterator[None]:
        start_s = self._clock()
        try:
            yield
        finally:
            self.spans.append(Span(name, actor, start_s, self._clock()))

    def seconds(self, name: str) -> float:
        return sum(span.end_s - span.start_s for span in self.spans if span.name == name)

    async def of(self, name: str, work: Awaitable[T], actor: str = DRIVER) -> T:
        with self.during(name, actor):
            return await work


def where_time_went(spans: Sequence[Span]) -> str:
    """The largest part of the step: `62 % generation tail, engine 1`; empty without spans of the driver.

    While the driver waits for groups, the time is generation until TAIL_SHARE of the batch's groups are sampled, then
    the generation's tail, and, once the last is sampled, the scoring.
    """
    phases = [span for span in spans if span.actor == DRIVER]
    whole_s = max((span.end_s for span in phases), default=0.0) - min((span.start_s for span in phases), default=0.0)
    if whole_s <= 0:
        return ""
    parts: dict[str, float] = {}
    for span in phases:
        for name, seconds in _parts(span, spans):
            parts[name] = parts.get(name, 0.0) + seconds
    name = max(parts, key=lambda name: parts[name])
    return f"{min(parts[name] / whole_s, 1.0):.0%} {name}".replace("%", " %", 1)


def _parts(phase: Span, spans: Sequence[Span]) -> Iterator[tuple[str, float]]:
    groups = sorted((span for span in spans if span.name == GENERATE), key=lambda span: span.end_s)
    if phase.name != WAIT or not groups:
        yield phase.name, phase.end_s - phase.start_s
        return
    last = groups[-1]
    tail_s = groups[min(int(TAIL_SHARE * len(groups)), len(groups) - 1)].end_s if len(groups) > 1 else last.end_s
    yield "generation", phase.within(phase.start_s, tail_s)
    yield f"generation tail, {last.actor}", phase.within(tail_s, last.end_s)
    yield "scoring of the last groups", phase.within(max(last.end_s, phase.start_s), phase.end_s)


def chrome_trace(spans: Sequence[Span], *, step: int) -> dict[str, object]:
    """Trace events in microseconds since the first span began: an actor is a process there, a lane a thread."""
    start_s = min((span.start_s for span in spans), default=0.0)
    actors = list(dict.fromkeys([DRIVER, *sorted(span.actor for span in spans)]))
    events: list[dict[str, object]] = [
        {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": actor}}
        for pid, actor in enumerate(actors)]
    free_s: dict[tuple[str, int], float] = {}  # when a lane is free again
    for span in sorted(spans, key=lambda span: (span.start_s, -span.end_s)):
        lane = 0
        while free_s.get((span.actor, lane), start_s) > span.start_s:
            lane += 1
        free_s[span.actor, lane] = span.end_s
        events.append({
            "name": span.name, "cat": "step", "ph": "X", "pid": actors.index(span.actor), "tid": lane,
            "ts": round(1e6 * (span.start_s - start_s)), "dur": round(1e6 * (span.end_s - span.start_s)),
            "args": dict(span.told)})
    return {"traceEvents": events, "displayTimeUnit": "ms",
            "otherData": {"step": step, "most": where_time_went(spans)}}
