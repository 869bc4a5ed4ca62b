"""Actors, and groups of them, around objects of this process.

Gives:  `LocalActor`, `LocalCall`, `LocalGroup`, which obey cluster.group; a LocalActor can be killed.
Knows:  what a method raises reaches the caller as from a real actor; deadlines are left out where time is simulated.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from flux_ray.cluster.group import ActorDied, ActorError, CallFailed

_numbers = itertools.count()


class LocalCall:
    def __init__(self, actor: LocalActor, method: str, args: Any, kwargs: Any) -> None:
        self._actor, self._method = actor, method
        self._task = asyncio.ensure_future(actor.run(method, args, kwargs))
        actor.tasks.add(self._task)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._actor.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, whether anybody waits or not

    async def within(self, deadline_s: float, *, what: str | None = None) -> Any:
        actor, what = self._actor, what or self._method
        try:
            if self._actor.has_deadlines:
                async with asyncio.timeout(deadline_s):
                    return await asyncio.shield(self._task)
            return await asyncio.shield(self._task)
        except asyncio.CancelledError:
            if not actor.alive and not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise ActorDied(f"{actor.role} {actor.index} died during {what} (killed)", role=actor.role,
                                index=actor.index) from None
            self._task.cancel()
            raise
        except (ActorDied, TimeoutError):
            raise
        except Exception as error:
            raise CallFailed.of(error).as_error(actor.role, actor.index, what=what, log_dir=None) from error

    def cancel(self) -> None:
        self._task.cancel()


class LocalActor:
    def __init__(self, role: str, index: int, make: Callable[[int], Any], *, has_deadlines: bool = True) -> None:
        self.role, self.index, self.incarnation = role, index, f"{role} {index} #{next(_numbers)}"
        self.object, self.has_deadlines = make(index), has_deadlines
        self.alive = True
        self.death: asyncio.Future[ActorError] = asyncio.get_running_loop().create_future()
        self.tasks: set[asyncio.Task[Any]] = set()

    def call(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> LocalCall:
        return LocalCall(self, method.__name__, args, kwargs)

    def together(self) -> LocalActor:
        return self

    async def run(self, method: str, args: Any, kwargs: Any) -> Any:
        if not self.alive:
            raise ActorDied(f"{self.role} {self.index} died", role=self.role, index=self.index)
        result = getattr(self.object, method)(*args, **kwargs)
        return await result if inspect.isawaitable(result) else result

    async def ping(self, within_s: float) -> bool:
        if not self.alive:
            raise ActorDied(f"{self.role} {self.index} died", role=self.role, index=self.index)
        return True

    def kill(self) -> None:
        """As SIGKILL: what runs in it is gone, and whoever waits for it is told."""
        if self.alive:
            self.alive = False
            for task in list(self.tasks):
                task.cancel()
            if hasattr(self.object, "die"):
                self.object.die()
            self.death.set_result(ActorDied(f"{self.role} {self.index} died", role=self.role, index=self.index))


class LocalGroup:
    def __init__(self, role: str, make: Callable[[int], Any], count: int, *, has_deadlines: bool = True,
                 replace_s: float = 0.0) -> None:
        self.role, self._make, self._has_deadlines, self._replace_s = role, make, has_deadlines, replace_s
        self._actors = [self._actor(index) for index in range(count)]

    def _actor(self, index: int) -> LocalActor:
        return LocalActor(self.role, index, self._make, has_deadlines=self._has_deadlines)

    def __len__(self) -> int:
        return len(self._actors)

    def __getitem__(self, index: int) -> LocalActor:
        return self._actors[index]

    def __iter__(self) -> Iterator[LocalActor]:
        return iter(self._actors)

    async def death(self, index: int) -> ActorError:
        return await asyncio.shield(self._actors[index].death)

    async def replace(self, index: int, *, deadline_s: float) -> None:
        self._actors[index].kill()
        await asyncio.sleep(self._replace_s)
        self._actors[index] = self._actor(index)
