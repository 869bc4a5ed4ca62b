"""What an actor group is, whoever runs it.

Takes:  nothing.
Gives:  the protocol that rooms and the driver program against, and the errors a call can end with.
Never:  knows Ray: a group of objects in this process obeys it as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Protocol


class ActorError(RuntimeError):
    """A call to an actor failed: says which actor, what it did and why; `__cause__` is the actor's own exception."""

    def __init__(self, message: str, *, role: str, index: int) -> None:
        super().__init__(message)
        self.role = role
        self.index = index


class ActorGroup(Protocol):
    """`size` actors of one role, each around one plain object."""

    role: str

    @property
    def size(self) -> int: ...

    def submit(self, index: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        """Start a call; gives its reference (a list of them for num_returns > 1) at once."""

    async def result(self, reference: Any, *, index: int, what: str, deadline_s: float) -> Any:
        """Wait for a reference. ActorError when the call failed or the actor died; TimeoutError after the deadline."""

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """submit and result."""

    async def call_all(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> list[Any]:
        """The same call on every actor; the first failure is raised."""

    async def close(self, *, deadline_s: float) -> None:
        """Ask each object to close, then end the actors. Never raises."""


async def first_failure(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    """Results of all calls; the first that fails is raised at once and the others are dropped (never waited for)."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in tasks:
            if task in done and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
