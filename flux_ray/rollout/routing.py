"""Which engine gets the next group.

Takes:  how many tokens each request is expected to cost.
Gives:  the engine with the fewest tokens outstanding; the lowest index among equals, so that a run repeats.
Never:  waits, or calls an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Router:
    """Tokens outstanding by engine.

    >>> router = Router(2)
    >>> with router.route(100) as first, router.route(10) as second, router.route(10) as third:
    ...     print(first, second, third)
    0 1 1
    """

    def __init__(self, num_engines: int) -> None:
        self._outstanding = [0] * num_engines

    @contextmanager
    def route(self, num_tokens: int) -> Iterator[int]:
        """An engine for a request of that many tokens (prompt, and responses at their longest), held until it is
        done.
        """
        engine = min(range(len(self._outstanding)), key=lambda index: (self._outstanding[index], index))
        self._outstanding[engine] += num_tokens
        try:
            yield engine
        finally:
            self._outstanding[engine] -= num_tokens
