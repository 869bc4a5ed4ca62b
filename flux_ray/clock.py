"""The clock of whoever runs on an event loop.

Gives:  `now_s`: seconds on the event loop's own clock, which a simulation may set as it likes.
"""

from __future__ import annotations

import asyncio


def now_s() -> float:
    """Seconds from some point in the past (of a real loop: time.monotonic)."""
    return asyncio.get_running_loop().time()
