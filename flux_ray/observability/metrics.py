"""Metrics typed by how they reduce.

Takes:  values from micro-batches, ranks and stages, as Mean (total and weight), Std, Explained, Sum or Max.
Gives:  one float a name; `merge` adds up dicts in any order.
Never:  a mean of means: a Mean carries its weight (tokens, samples) until it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """Total over weight. Mean(6., 3) is the mean 2 of three values; a weight of 0 reads as nan."""

    total: float
    weight: float = 1.0

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan


@dataclass(frozen=True)
class Std:
    """Population standard deviation (ddof 0) from sums: total, sum of squares, weight."""

    total: float
    squares: float
    weight: float

    def __add__(self, other: Std) -> Std:
        return Std(self.total + other.total, self.squares + other.squares, self.weight + other.weight)

    @property
    def value(self) -> float:
        if not self.weight:
            return math.nan
        mean = self.total / self.weight
        return math.sqrt(max(self.squares / self.weight - mean * mean, 0.0))


@dataclass(frozen=True)
class Explained:
    """Explained variance 1 − Var(error) / Var(wanted) from sums; nan where what was wanted is the same everywhere."""

    wanted: Std
    error: Std

    @staticmethod
    def of(wanted: Tensor, error: Tensor) -> Explained:
        """Of two tensors of one length."""
        sums = [Std(float(x.sum()), float(x.square().sum()), x.numel()) for x in (wanted, error)]
        return Explained(*sums)

    def __add__(self, other: Explained) -> Explained:
        return Explained(self.wanted + other.wanted, self.error + other.error)

    @property
    def value(self) -> float:
        spread = self.wanted.value
        return 1 - (self.error.value / spread) ** 2 if spread else math.nan


@dataclass(frozen=True)
class Sum:
    total: float

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


@dataclass(frozen=True)
class Max:
    largest: float

    def __add__(self, other: Max) -> Max:
        return Max(max(self.largest, other.largest))

    @property
    def value(self) -> float:
        return self.largest


Metric = Mean | Std | Explained | Sum | Max


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Add up dicts of metrics, name by name; a name in one of them alone is kept."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name] + metric if name in merged else metric  # type: ignore[operator]
    return merged


def read(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The values, by name;

    a Mean or Std over nothing is left out (a metric that wasn't measured is absent, not nan).
    """
    return {name: metric.value for name, metric in metrics.items() if not math.isnan(metric.value)}
