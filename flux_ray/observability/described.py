"""What a metric is, said once, beside the code that computes it.

Takes:  nothing.
Gives:  `Described`: formula, unit, what it is over, what is healthy, what to do else; `Range`; `renamed`.
Knows:  NAME, PART, CAUSE and SET in a name stand for any word, K after @ for a number.
Never:  holds a value.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

ANY = re.compile(r"\b(NAME|PART|CAUSE|SET)\b|(?<=_)CAUSE|(?<=@)K\b")


@dataclass(frozen=True)
class Range:
    """What is healthy, both bounds included. A value outside it for `steps` steps in a row is told."""

    low: float | None = None
    high: float | None = None
    steps: int = 5

    def holds(self, value: float) -> bool:
        """Whether it is in the range. nan is: what isn't finite is told elsewhere."""
        return not ((self.low is not None and value < self.low) or (self.high is not None and value > self.high))

    def missed_by(self, value: float) -> str:
        """
        >>> Range(low=0.5).missed_by(0.25)
        'below 0.5'
        """
        return f"below {self.low:g}" if self.low is not None and value < self.low else f"above {self.high:g}"

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"≥ {self.low:g}" if self.low is not None else f"≤ {self.high:g}"


@dataclass(frozen=True)
class Described:
    name: str
    formula: str
    unit: str = "1"  # nat, s, token, reward, …; 1: a number or a share
    over: str = ""  # the mask: what a mean, a share or a sum is over
    healthy: Range | str = ""  # words where no number fits every run
    otherwise: str = ""  # what to do, or where to look first, when it isn't healthy

    def fits(self, name: str) -> bool:
        """
        >>> one = Described("filter/rate_CAUSE", "")
        >>> one.fits("filter/rate_unscored"), one.fits("filter/rate_a/b")
        (True, False)
        """
        return re.fullmatch(ANY.sub("[^/]+", self.name), name) is not None


def renamed(one: Described, name: str, **values: str) -> Described:
    """The same under another name: of a critic's update, of an evaluation."""
    return dataclasses.replace(one, name=name, **values)  # type: ignore[arg-type]


def plain(text: str) -> str:
    """Without Markdown's marks, for a terminal.

    >>> plain("`a` [as here](there.md)")
    'a as here (there.md)'
    """
    return text.replace("`", "").replace("](", " (").replace("[", "")
