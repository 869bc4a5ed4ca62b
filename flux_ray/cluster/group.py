"""What an actor group is, whoever runs it.

Takes:  nothing.
Gives:  the protocol that rooms and the driver program against, and the errors a call can end with.
Never:  knows Ray: a group of objects in this process obeys it as well.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Any, Protocol


class ActorError(RuntimeError):
    """A call to an actor failed: says which actor, what it did and why; `__cause__` tells the actor's own traceback.

    `log_file` is where the actor's own output lies, if it has any of its own.
    """

    def __init__(self, message: str, *, role: str, index: int, log_file: Path | None = None) -> None:
        super().__init__(message)
        self.role = role
        self.index = index
        self.log_file = log_file


class ActorDied(ActorError):
    """The actor is gone, or was ended because it answered nobody: another call to it can't succeed."""


class ActorGroup(Protocol):
    """`size` actors of one role, each around one plain object."""

    role: str

    @property
    def size(self) -> int: ...

    def submit(self, index: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        """Start a call; gives its reference at once.

        With num_returns=2, for a method that gives two things: a handle of the first, which stays where it was made and
        may be an argument, anywhere in it, of other calls; and a reference to the second.
        """

    async def result(self, reference: Any, *, index: int, what: str, deadline_s: float) -> Any:
        """Wait for a reference. ActorError when the call failed or the actor died; TimeoutError after the deadline."""

    def cancel(self, reference: Any) -> None:
        """Nobody waits for a submitted call any more: a coroutine is cancelled where it runs. Never waits or fails."""

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        """submit and result."""

    async def call_watched(
        self, index: int, method: str, *args: Any, what: str, deadline_s: float, patience_s: float
    ) -> Any:
        """As call; an actor that doesn't even answer a ping within `patience_s` is ended: ActorDied."""

    def incarnation(self, index: int) -> Any:
        """Which of the actors that have stood at `index` stands there now."""

    async def replace(self, index: int, *, seen: Any, deadline_s: float) -> None:
        """A new actor with an object made alike, where the one at `index` is still the one that was `seen`."""

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
