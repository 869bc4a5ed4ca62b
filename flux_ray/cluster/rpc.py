"""Calls to actors, on Ray.

Takes:  a method of the class that an actor is typed by, and its arguments.
Gives:  `Host`, the Ray actor around one plain object; `RayActor`, its handle, an Actor; `Together`, the same over a
        Line; `RayCall`, a Call.
Knows:  where a method runs, where an actor's output goes, and how its failure becomes one readable line.
Never:  waits for a call without a deadline.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import logging
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from flux_ray import ports
from flux_ray.cluster.group import ActorDied, ActorError, ActorLate, CallFailed
from flux_ray.cluster.scratch import name_semaphores
from flux_ray.cluster.together import Answer, Desk, Line, LineCall, Lost, Sent
from flux_ray.errors import UserError
from flux_ray.lifetime import end_with_parent

if TYPE_CHECKING:
    from ray.actor import ActorHandle

LOOPBACK = "127.0.0.1"
LEAVE_DEADLINE_S, LEAVE_AFTER_S = 3.0, 0.2  # for the object to close; for the answer to be on its way


class Host:
    """Coroutines run on the loop; plain methods run one after the other in one thread.

    So a long method doesn't block the loop, and its OpenMP pool is always the same.
    """

    def __init__(self, log_file: str, plugins: list[str]) -> None:
        redirect_output(log_file)
        gc.disable()  # until all is imported: a tenth to a quarter of the imports' time, in which nothing is garbage
        # Ray asks a worker whose raylet died to end, but an object's threads may keep it from ending.
        end_with_parent()
        name_semaphores()
        # Our own code talks to the log through logging; Ray and vLLM write to the file descriptors.
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        from flux_ray.plugins import load_plugins

        load_plugins(plugins)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._object: object = None
        self._desks: dict[str, Desk] = {}

    def address(self, of_one_machine: bool) -> tuple[str, int]:
        """An address that all actors reach, and a port there that is held for the object."""
        address = LOOPBACK if of_one_machine else ray.util.get_node_ip_address()
        return address, ports.reserve(address)

    async def ping(self) -> None:
        """Answered as long as nothing blocks the process."""

    async def live(self) -> None:
        """Never answered: its reference fails when the actor dies."""
        await asyncio.Event().wait()

    async def build(self, cls: Callable[..., object], kwargs: Mapping[str, object]) -> None:
        gc.enable()
        self._object = await asyncio.get_running_loop().run_in_executor(self._thread, lambda: cls(**kwargs))
        gc.freeze()  # else each full collection looks at the hundreds of thousands of objects that the libraries made

    @ray.method(enable_task_events=False)  # they are a third of a call's cost, and nobody looks for these tasks
    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        return await self._do(method, args, kwargs)

    @ray.method(enable_task_events=False)
    async def exchange(self, caller: str, calls: list[Sent], given_up: list[int]) -> list[Answer]:
        """Carry out calls of the Line that `caller` names, and give what answers there are."""
        desk = self._desks[caller] = self._desks.get(caller) or Desk(self._do)
        answers = await desk.exchange(calls, given_up)
        if desk.is_idle:  # or those of callers that died would stay
            self._desks.pop(caller, None)
        return answers

    async def _do(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        try:
            function = getattr(self._object, method)
            if inspect.iscoroutinefunction(function):
                return await function(*args, **kwargs)
            return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise  # the caller's wish; else the function cancelled itself, and the caller waits
            raise CallFailed.of(error) from None
        except BaseException as error:
            raise CallFailed.of(error) from None

    async def close(self) -> None:
        close = getattr(self._object, "close", None)
        if close is not None:
            result = close()
            if inspect.isawaitable(result):
                await result

    async def leave(self) -> None:
        """Close, and end this process right after this is answered."""
        try:
            async with asyncio.timeout(LEAVE_DEADLINE_S):
                await self.close()
        finally:
            asyncio.get_running_loop().call_later(LEAVE_AFTER_S, os._exit, 0)


@dataclass(frozen=True)
class RayActor:
    """The handle of a Host. Other actors may have it too."""

    handle: ActorHandle
    role: str
    index: int
    incarnation: str
    log_file: Path

    def call(self, method: Callable[..., object], /, *args: object, **kwargs: object) -> RayCall:
        return RayCall(self, method.__name__, self.handle.call.remote(method.__name__, args, kwargs))

    def together(self) -> Together:
        """The same actor; the calls that this process makes through it travel together."""
        return Together(self, _line(self))

    def host(self, method: Callable[..., object], /, *args: object) -> RayCall:
        """A call of a method of the Host itself."""
        return RayCall(self, method.__name__, getattr(self.handle, method.__name__).remote(*args))

    async def ping(self, within_s: float) -> bool:
        try:
            await self.host(Host.ping).within(within_s)
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        ray.kill(self.handle, no_restart=True)

    def died(self, error: BaseException, when: str) -> ActorDied:
        return ActorDied(f"{self.role} {self.index} died{when} ({_why_died(error)})", role=self.role, index=self.index,
                         log_file=self.log_file)

    def failed(self, cause: BaseException, what: str) -> Exception:
        """What the caller raises for what a call raised there."""
        if isinstance(cause, CallFailed):
            return cause.as_error(self.role, self.index, what=what, log_dir=self.log_file.parent)
        if isinstance(cause, UserError):
            return cause
        return ActorError(f"{self.role} {self.index}, {what}: {type(cause).__name__}: {cause}", role=self.role,
                          index=self.index, log_file=self.log_file, raised=type(cause).__name__)

    def late(self, what: str, deadline_s: float) -> ActorLate:
        return ActorLate(f"{self.role} {self.index} did not finish {what} within {deadline_s:g} s; its log: "
                         f"{self.log_file}", role=self.role, index=self.index)


@dataclass(frozen=True)
class Together:
    """An Actor over a Line."""

    actor: RayActor
    line: Line

    @property
    def role(self) -> str:
        return self.actor.role

    @property
    def index(self) -> int:
        return self.actor.index

    @property
    def incarnation(self) -> str:
        return self.actor.incarnation

    def call(self, method: Callable[..., object], /, *args: object, **kwargs: object) -> LineCall:
        return self.line.call(method.__name__, args, kwargs)

    def together(self) -> Together:
        return self

    async def ping(self, within_s: float) -> bool:
        return await self.actor.ping(within_s)

    def kill(self) -> None:
        self.actor.kill()


_lines: dict[str, Line] = {}  # of this process, by the incarnation of the actor called


def _line(actor: RayActor) -> Line:
    if actor.incarnation not in _lines:
        _lines[actor.incarnation] = _new_line(actor)
    return _lines[actor.incarnation]


def _new_line(actor: RayActor) -> Line:
    caller = uuid.uuid4().hex  # names this line: each line numbers its calls from 1

    async def exchange(calls: list[Sent], given_up: list[int]) -> list[Answer]:
        """Has no deadline of its own: each call has one, and the actor's death ends all calls."""
        try:
            return await actor.handle.exchange.remote(caller, calls, given_up)
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
            _lines.pop(actor.incarnation, None)
            raise Lost from error
        except Exception as error:  # an argument or a result that can't travel
            raise actor.failed(getattr(error, "cause", None) or error, "exchange") from error

    return Line(actor, exchange)


class RayCall:
    def __init__(self, actor: RayActor, method: str, reference: ray.ObjectRef) -> None:
        self._actor, self._method, self._reference = actor, method, reference

    async def within(self, deadline_s: float, *, what: str | None = None) -> Any:
        actor, what = self._actor, what or self._method
        try:
            async with asyncio.timeout(deadline_s) as limit:  # wait_for forgets that it was cancelled (Python 3.11)
                return await self._reference
        except asyncio.CancelledError:
            self.cancel()
            raise
        except (TimeoutError, ray.exceptions.RayTaskError) as error:  # Ray's is of its cause's type too
            if limit.expired():
                self.cancel()
                raise actor.late(what, deadline_s) from None
            cause = getattr(error, "cause", None)
            raise actor.failed(cause if isinstance(cause, BaseException) else error, what) from cause
        except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:  # it, or where its answer lay
            raise actor.died(error, f" during {what}") from error

    def cancel(self) -> None:
        try:
            ray.cancel(self._reference, recursive=False)
        except Exception as error:  # it is over already, or Ray is
            logging.getLogger(__name__).debug("not cancelled: %s", error)


def redirect_output(file: str | Path) -> None:
    """Send this process's output, and its children's, to a file (made with its folder)."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    log = os.open(str(file), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    # Ray replaced the streams by its own: what Python prints must go the same way.
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _why_died(error: BaseException) -> str:
    """Ray's reason in a few words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "creation task" in lines[0]:
        return lines[-1]  # the exception, below its traceback
    detail = re.search(r"Worker exit detail: (.*?)\.?( Some common causes| Worker |$)", " ".join(lines))
    if detail:
        return detail[1]
    for line in lines:
        if "cause" in line.lower() or "exit" in line.lower() or "kill" in line.lower():
            return line.rstrip(".")
    return lines[0]
