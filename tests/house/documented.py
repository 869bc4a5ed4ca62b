"""The metrics that have an entry in the catalogue, from which docs/metrics.md is made.

Takes:  names that a run has written.
Gives:  `undocumented`: those of them that have none; `names`: all that have one.
Knows:  a placeholder for any word, as NAME, makes no misspelt `actor/` metric a known one.
"""

from __future__ import annotations

from collections.abc import Iterable

from flux_ray.run.catalogue import ALL, find

PLAIN = ("step", "answers")  # fields of a line that are no metrics
OF_A_USER = "actor/NAME"  # a policy loss of one's own


def names() -> list[str]:
    return [one.name for one in ALL]


def undocumented(written: Iterable[str]) -> list[str]:
    found = {name: find(name) for name in set(written) if name not in PLAIN}
    return sorted(name for name, one in found.items() if one is None or one.name == OF_A_USER)
