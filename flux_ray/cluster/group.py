"""What an actor is to its callers, whatever runs it.

Gives:  Protocols of an actor, a call to it and a group of actors; Members; the errors that a call can end with.
Knows:  a call names a method of the class that the actor is typed by: `engine.call(Engine.generate, request)`.
Never:  knows Ray: an object of this process may stand behind an Actor as well.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar, overload

from flux_ray.errors import UserError

T_co = TypeVar("T_co", covariant=True)
R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


class ActorError(RuntimeError):
    """A call to an actor failed. Says which actor, what it did and why; `__cause__` has the actor's own traceback.

    `log_file` holds the actor's own output, if it has any. `raised` names the exception there.
    """

    def __init__(
        self, message: str, *, role: str, index: int, log_file: Path | None = None, raised: str = ""
    ) -> None:
        super().__init__(message)
        self.raised = raised
        self.role = role
        self.index = index
        self.log_file = log_file


class ActorDied(ActorError):
    """The actor is gone, or was ended because it answered nobody: no further call to it can succeed."""


class ServerLost(RuntimeError):
    """The server of a cluster that was joined is gone: nothing can be started there any more."""


class ActorLate(TimeoutError):
    """An actor has not answered a call within its deadline: it is stuck, or somebody whom it waits for is."""

    def __init__(self, message: str, *, role: str, index: int) -> None:
        super().__init__(message)
        self.role, self.index = role, index


class CallFailed(Exception):
    """What a call raised in its actor, as text: not every exception can travel. `__str__` is the actor's traceback."""

    def __init__(
        self, name: str, text: str, where: str, by_user: bool = False, died: bool = False,
        actor: tuple[str, int] | None = None,
    ) -> None:
        super().__init__(name, text, where, by_user, died, actor)
        self.name, self.text, self.where = name, text, where
        self.by_user = by_user  # a UserError
        self.died = died  # an ActorDied
        self.actor = actor  # role and index of another actor that this call asked, and that failed

    @classmethod
    def of(cls, error: BaseException) -> CallFailed:
        if isinstance(error, CallFailed):
            return error
        where = "".join(traceback.format_exception(error))
        actor = (error.role, error.index) if isinstance(error, ActorError) else None
        return cls(type(error).__name__, str(error), where, isinstance(error, UserError), isinstance(error, ActorDied),
                   actor)

    def as_error(self, role: str, index: int, *, what: str, log_dir: Path | None) -> Exception:
        """The error for the caller of `role` `index` to raise: a UserError, or an ActorError about who failed."""
        if self.by_user:
            return UserError(self.text)
        kind, text = ActorDied if self.died else ActorError, self.text
        if self.actor is None:
            text = f"{role} {index}, {what}: {self.name}: {self.text}"
        role, index = self.actor or (role, index)
        log_file = log_dir and log_dir / f"{role}-{index}.log"
        return kind(text, role=role, index=index, log_file=log_file, raised=self.name)

    def __str__(self) -> str:
        return self.where


class Call(Protocol[R_co]):
    """A call that has been sent. Only `within` waits for it, so that every wait has a deadline."""

    async def within(self, deadline_s: float, *, what: str | None = None) -> R_co:
        """The result. `what` names the call in an error, in place of the method's name.

        Raises ActorError where the call failed, ActorDied where the actor died, UserError as it was raised there,
        ActorLate after the deadline. A caller that is cancelled, or passes the deadline, cancels the call.
        """

    def cancel(self) -> None:
        """Nobody waits any more: a coroutine is cancelled where it runs. Never waits or fails."""


class Actor(Protocol[T_co]):
    """A handle of one actor around an object of type T, whose methods can be called. It may be sent to other actors."""

    @property
    def role(self) -> str: ...

    @property
    def index(self) -> int: ...

    @property
    def incarnation(self) -> str:
        """Names this actor among all that have stood at this index. No two actors share one."""

    @overload
    def call(
        self, method: Callable[Concatenate[T_co, P], Coroutine[object, object, R]], /, *args: P.args, **kwargs: P.kwargs
    ) -> Call[R]: ...

    @overload
    def call(self, method: Callable[Concatenate[T_co, P], R], /, *args: P.args, **kwargs: P.kwargs) -> Call[R]: ...

    def together(self) -> Actor[T_co]:
        """The same actor, for many calls at one moment: the calls of this process travel together."""

    async def ping(self, within_s: float) -> bool:
        """Whether the process answers, as long as nothing blocks it. Raises ActorDied."""

    def kill(self) -> None:
        """End the process at once."""


class Group(Protocol[T_co]):
    """The actors of one role. The supervisor alone replaces them."""

    @property
    def role(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Actor[T_co]: ...

    def __iter__(self) -> Iterator[Actor[T_co]]: ...

    async def death(self, index: int) -> ActorError:
        """Waits as long as the actor lives, then says how it died."""

    async def replace(self, index: int, *, deadline_s: float) -> None:
        """End the actor at `index`; another one stands there when this returns, with an object made alike."""


@dataclass(frozen=True)
class Members:
    """Who is alive: the actors of each role by index. A later epoch replaces an earlier one."""

    epoch: int = 0
    actors: dict[str, tuple[Actor[Any], ...]] = field(default_factory=dict)

    def of(self, role: str) -> tuple[Actor[Any], ...]:
        return self.actors.get(role, ())

    @property
    def incarnations(self) -> frozenset[str]:
        return frozenset(actor.incarnation for actors in self.actors.values() for actor in actors)


async def first_failure(calls: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all calls. The first failure is raised at once, and the other calls are cancelled."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION) if tasks else (set(), None)
        for task in tasks:
            if task in done and task.exception() is not None:
                raise task.exception()  # type: ignore[misc]
        return [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def all_within(calls: Sequence[Call[R]], deadline_s: float) -> list[R]:
    """The results of calls to several actors, each under the deadline; the first failure is raised."""
    return await first_failure([call.within(deadline_s) for call in calls])


class Router(Generic[T]):
    """Of several actors the one with the fewest of this router's tokens outstanding; the first among equals.

    Waits for nobody, and calls nobody.
    """

    def __init__(self) -> None:
        self._outstanding: dict[str, int] = {}

    def choose(self, actors: Sequence[Actor[T]], num_tokens: int) -> Actor[T]:
        """Count the tokens as outstanding until `done`."""
        actor = min(actors, key=lambda actor: self._outstanding.get(actor.incarnation, 0))
        self._outstanding[actor.incarnation] = self._outstanding.get(actor.incarnation, 0) + num_tokens
        return actor

    def done(self, actor: Actor[T], num_tokens: int) -> None:
        left = self._outstanding[actor.incarnation] - num_tokens
        if left:
            self._outstanding[actor.incarnation] = left
        else:
            del self._outstanding[actor.incarnation]
