"""The metrics that docs/metrics.md explains.

Takes:  names that a run has written.
Gives:  `undocumented`: those of them that the page doesn't have.
Knows:  NAME, PART and CAUSE there stand for any name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
METRIC = re.compile(r"`([a-z]+/[\w/]+)`")
PLAIN = ("step", "answers")  # fields of a line that are no metrics


def names() -> list[str]:
    """In the first column of its tables; of the evaluations, in the text."""
    lines = PAGE.read_text().splitlines()
    rows = [line.split("|")[1] for line in lines if line.startswith("| `")]
    text = [line for line in lines if "`eval/" in line and not line.startswith("|")]
    return [name for line in [*rows, *text] for name in METRIC.findall(line)]


def undocumented(written: Iterable[str]) -> list[str]:
    patterns = [re.compile(re.sub("NAME|PART|CAUSE", r"[^/]+", name)) for name in names()]
    return sorted(name for name in set(written) if name not in PLAIN and not any(p.fullmatch(name) for p in patterns))
