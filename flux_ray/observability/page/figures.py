"""What a report and a comparison compute of a run's files.

Takes:  the lines of metrics.jsonl and eval.jsonl, rewards by prompt.
Gives:  `series`, `tail_mean`, `cost`.
Never:  counts a value that isn't a finite number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

Points = list[tuple[float, float]]
TAIL = 0.1  # the share of a run's steps that its end is the mean of
HOUR_S = 3600.0


def series(lines: Sequence[Mapping[str, object]]) -> dict[str, Points]:
    """Metric ► its (step, value), in the order of the lines."""
    found: dict[str, Points] = {}
    for line in lines:
        step = _number(line.get("step"))
        for name, value in line.items():
            number = _number(value)
            if name != "step" and number is not None and step is not None:
                found.setdefault(name, []).append((step, number))
    return found


def _number(value: object) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None  # type: ignore[arg-type]  # isinstance stands in is_number


def first_of_tail(last_step: float, first_step: float = 0) -> float:
    """The step that the last tenth of a run begins with; it has one step at least."""
    return last_step + 1 - max(1, math.ceil(TAIL * (last_step + 1 - first_step)))


def tail_mean(points: Points) -> float:
    """The mean over the last tenth of the steps."""
    first = first_of_tail(points[-1][0], points[0][0])
    return float(np.mean([value for step, value in points if step >= first]))


def cost(metrics: Mapping[str, Points]) -> list[tuple[str, str]]:
    """Headings and their texts: steps, time with its parts, tokens. Only what the metrics tell."""
    num_steps = max((len(points) for points in metrics.values()), default=0)
    seconds, tokens = _sum(metrics, "driver/step_s"), _sum(metrics, "rollout/tokens")
    lines = [("steps", f"{num_steps:,}")]
    if seconds:
        lines.append(("time in steps", f"{seconds:,.0f} s ({seconds / HOUR_S:.2f} h)"))
        for name, what in (("driver/wait_s", "waiting for groups"), ("train/step_s", "training"),
                           ("weights/publish_s", "publishing weights"), ("driver/write_s", "writing rollouts")):
            part = _sum(metrics, name)
            if part:
                lines.append((f"· {what}", f"{part:,.0f} s, {100 * part / seconds:.0f} %"))
    if tokens:
        a_second = f", {tokens / seconds:,.0f} a second of a step" if seconds else ""
        lines.append(("tokens sampled", f"{tokens:,.0f}{a_second}"))
    return lines


def _sum(metrics: Mapping[str, Points], name: str) -> float:
    return math.fsum(value for _, value in metrics.get(name, []))
