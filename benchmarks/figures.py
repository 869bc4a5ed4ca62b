"""What the benchmark measures: names, units, goals; medians and the table. Pure code.

Takes:  repeated values of a figure.
Gives:  FIGURES; Measured, a figure's result; `chosen` (the figures of --only), `table`, `as_json`.
"""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from flux_ray.errors import unknown

COMPARED: dict[str, Callable[[float, float], bool]] = {"<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Figure:
    """One name of --only. `measure` names the module's function that gives its results: `module:function`."""

    name: str
    meaning: str
    measure: str


#: In the order in which they are measured.
FIGURES = {figure.name: figure for figure in (
    Figure("sync_ratio", "synchronous step / sum of the bare parts", "steps:sync_ratio"),
    Figure("async_ratio", "max_staleness=1 step / the larger of bare generation and bare training, one core each",
           "steps:async_ratio"),
    Figure("async_gain", "own synchronous / asynchronous step, as a share of the ideal (g + t) / max(g, t)",
           "steps:async_gain"),
    Figure("vs_trl", "TRL's GRPOTrainer step / ours, each at its best setting, both cores", "peer:vs_trl"),
    Figure("vs_trl_limit", "TRL's step / half of the sum of the bare parts: no loss on two cores, equal lengths",
           "peer:limit"),
    Figure("padding", "forwarded but unused tokens, log-normal lengths", "steps:padding"),
    Figure("publish", "optimizer step to the first token of the new version on every engine; the stall",
           "publish:publish"),
    Figure("driver", "driver's CPU time for a group, with 10, 100 and 1,000 in flight", "driver_cost:cpu"),
    Figure("workers", "CPU time for a group of the driver and of all that carry it, 32 rollout workers with 64 each",
           "driver_cost:workers"),
    Figure("driver_bytes", "bytes through the driver's sockets for a group, short and long", "driver_cost:sockets"),
    Figure("memory", "growth of the driver over 1,000 steps", "driver_cost:memory"),
)}


def chosen(names: str | None) -> list[Figure]:
    """The figures of `--only NAME,NAME` (None: all). UserError for a name that isn't there, with the nearest."""
    if names is None:
        return list(FIGURES.values())
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in FIGURES:
            raise unknown("--only", name, FIGURES)
    return [figure for name, figure in FIGURES.items() if name in asked]


@dataclass(frozen=True)
class Measured:
    """One line of the table.

    >>> Measured.of("sync_ratio", [1.05, 1.04, 1.06], unit="x", goal="<= 1.08").value
    1.05
    """

    name: str
    value: float  # median
    unit: str
    goal: str | None  # "<= 1.08"; None: for orientation
    runs: int
    quartiles: tuple[float, float]
    about: dict[str, Any] = field(default_factory=dict)  # what else there is to know: floors, settings

    @classmethod
    def of(cls, name: str, values: Sequence[float], *, unit: str, goal: str | None = None, **about: Any) -> Measured:
        return cls(name, statistics.median(values), unit, goal, len(values), quartiles(values), about)

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else meets(self.value, self.goal)


@dataclass(frozen=True)
class Failed:
    """A figure that could not be measured, and why."""

    name: str
    reason: str


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third, by linear interpolation between the values; a single value is both."""
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def meets(value: float, goal: str) -> bool:
    """Whether the value is what a goal such as `<= 1.08` asks for."""
    sign, bound = goal.split()
    return COMPARED[sign](value, float(bound))


def as_json(result: Measured | Failed) -> str:
    """One line."""
    if isinstance(result, Failed):
        return json.dumps({"name": result.name, "value": None, "unit": None, "goal": None, "runs": 0,
                           "error": result.reason})
    first, third = result.quartiles
    line = {"name": result.name, "value": significant(result.value), "unit": result.unit, "goal": result.goal,
            "met": result.met, "runs": result.runs, "iqr": significant(third - first),
            "quartiles": [significant(first), significant(third)]}
    return json.dumps(line | result.about)


def significant(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


HEAD = ("figure", "value", "quartiles", "unit", "goal", "met", "runs")


def table(results: Sequence[Measured | Failed]) -> str:
    """Aligned columns, one row a result; what failed says why."""
    rows = [HEAD]
    for result in results:
        if isinstance(result, Failed):
            rows.append((result.name, "failed", "", "", "", "", result.reason))
            continue
        spread = " .. ".join(f"{value:.4g}" for value in result.quartiles)
        met = {None: "", True: "yes", False: "NO"}[result.met]
        rows.append((result.name, f"{result.value:.4g}", spread, result.unit, result.goal or "", met, str(result.runs)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD) - 1)]
    return "\n".join("  ".join([*map(str.ljust, row[:-1], widths), row[-1]]).rstrip() for row in rows)
