"""How many rewards may fail before a run isn't worth going on.

Takes:  how many samples were scored, and how many of them failed.
Gives:  `Budget.count`, which raises UserError above a share of the last samples.
Knows:  a share of few samples says nothing.
"""

from __future__ import annotations

from collections import deque

from flux_ray.errors import UserError

LAST = 100  # samples of one reward worker


class Budget:
    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._last: deque[bool] = deque(maxlen=LAST)

    def count(self, size: int, *, failed: int, why: str) -> None:
        """`why`: what one of them failed for."""
        self._last.extend([True] * failed + [False] * (size - failed))
        share = sum(self._last) / LAST
        if failed and len(self._last) == LAST and share > self._max_share:
            raise UserError(f"the rewards of {share:.0%} of the last {LAST} samples failed, more than "
                            f"reward.max_error_share={self._max_share:g} allows; the last one: {why}")
