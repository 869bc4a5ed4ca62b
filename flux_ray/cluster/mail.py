"""Calls to one actor, many in one Ray call: a call by itself costs the driver more than all that it carries.

Takes:  calls as they are made; their results as they come, in the actor.
Gives:  `Mailbox`, the driver's end; `Inbox`, the actor's; `Letter`, what goes from one to the other.
Knows:  what is called within a moment travels together, and so do results. A letter stays open until there is a result
        to answer it with, whose call that may be.
Keeps:  the calls that wait for their results, and the handles that they were given, until then.
Never:  lets a result wait for another where none can come; leaves a call of a dead actor waiting.
"""

from __future__ import annotations

import asyncio
import itertools
import traceback
import uuid
from collections import Counter, deque
from collections.abc import Coroutine, Iterator
from typing import Any, NamedTuple

from flux_ray.cluster.group import ActorError
from flux_ray.cluster.held import Held, held_in
from flux_ray.errors import UserError

GATHER_S = 0.005  # so long a call waits for others of its method, and a result while calls of its method run
OPEN_LETTERS = 4  # of one mailbox: so many wait for results; more are closed at once


class CallFailed(Exception):
    """What a call raised in its actor, as text: not every exception can travel. `__str__` is the actor's traceback."""

    def __init__(
        self, name: str, text: str, where: str, by_user: bool, actor: tuple[str, int] | None = None
    ) -> None:
        super().__init__(name, text, where, by_user, actor)
        self.name, self.text, self.where = name, text, where
        self.by_user = by_user  # a UserError
        self.actor = actor  # role and index of another one that the call asked, and that failed

    @classmethod
    def of(cls, error: BaseException) -> CallFailed:
        where = "".join(traceback.format_exception(error))
        actor = (error.role, error.index) if isinstance(error, ActorError) else None
        return cls(type(error).__name__, str(error), where, isinstance(error, UserError), actor)

    def __str__(self) -> str:
        return self.where


class Call(NamedTuple):
    """`keeps`: of the two things that it gives, the first stays in the actor."""

    number: int
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keeps: bool


class Letter(NamedTuple):
    """What a mailbox sends. Results of its calls are for `box`."""

    box: str
    order: int  # 0, 1, 2 …: Ray may bring them in another one
    waits: bool  # for results
    calls: list[Call]
    cancelled: list[int]
    forgotten: list[int]  # calls whose kept values nobody needs any more
    peers: dict[str, Any]  # actors that the mailbox's own is to know: by their boxes


class Reference(asyncio.Future[Any]):
    """A result to come: awaited, it is that, or raises CallFailed or what Ray raises for an actor that died."""

    mailbox: Mailbox
    number: int


class Mailbox:
    """The driver's end of what it says to one actor. Used from one event loop."""

    def __init__(self, actor: Any, name: str) -> None:
        self.actor = actor
        self._box = f"{name}#{uuid.uuid4().hex[:8]}"  # no other mailbox's, of this actor or of another in its place
        self._numbers = itertools.count()
        self._order = 0
        self._waiting: dict[int, tuple[Reference, str, list[Held]]] = {}  # with method and handles
        self._methods: Counter[str] = Counter()  # of those
        self._calls: list[Call] = []
        self._cancelled: list[int] = []
        self._forgotten: deque[int] = deque()  # filled by whichever thread collects garbage
        self._peers: dict[str, Any] = {}
        self._introduced = {self._box}
        self._num_open = 0
        self._due = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._tell = actor.post.options(num_returns=0)

    def submit(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, keeps: bool = False) -> Reference:
        reference = Reference(loop=asyncio.get_running_loop())
        reference.mailbox, reference.number = self, next(self._numbers)
        handles = [*held_in(args), *held_in(kwargs)]
        for held in handles:
            if held.box not in self._introduced and held.mailbox is not None:
                self._introduced.add(held.box)
                self._peers[held.box] = held.mailbox.actor
        self._waiting[reference.number] = reference, method, handles
        self._methods[method] += 1
        self._calls.append(Call(reference.number, method, args, kwargs, keeps))
        self._send_soon()
        return reference

    def held(self, reference: Reference) -> Held:
        """The handle of what the call keeps. The value goes when this handle does."""
        return Held(self._box, reference.number, self)

    def forget(self, number: int) -> None:
        self._forgotten.append(number)

    def cancel(self, reference: Reference) -> None:
        if self._taken(reference.number) is None:
            return
        reference.cancel()
        left = [call for call in self._calls if call.number != reference.number]
        if len(left) < len(self._calls):  # it was not sent yet
            self._calls = left
            return
        self._cancelled.append(reference.number)
        self._send_soon()

    def _send_soon(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_soon(self._send_or_gather)

    def _send_or_gather(self) -> None:
        """A call goes at once where no other of its method waits for its result: where there are several, more come."""
        if all(self._methods[call.method] == 1 for call in self._calls):
            self._send()
        else:
            asyncio.get_running_loop().call_later(GATHER_S, self._send)

    def _send(self) -> None:
        self._due = False
        waits = self._num_open < OPEN_LETTERS
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        letter = Letter(self._box, self._order, waits, self._calls, self._cancelled, forgotten, self._peers)
        self._calls, self._cancelled, self._peers = [], [], {}
        try:
            sent = self.actor.post.remote(letter) if waits else self._tell.remote(letter)
        except Exception as error:  # Ray can't send what is in it
            return self._fail([call.number for call in letter.calls], CallFailed.of(error))
        self._order += 1
        if waits:
            self._num_open += 1
            task = asyncio.get_running_loop().create_task(self._receive(sent))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _receive(self, sent: Any) -> None:
        try:
            results = await sent
        except Exception as error:  # it died, or its results can't be read: what else it gives, nobody would know
            return self._fail(list(self._waiting), error)
        finally:
            self._num_open -= 1
        for number, result in results:
            reference = self._taken(number)
            if reference is None or reference.done():  # nobody waits any more
                continue
            if isinstance(result, CallFailed):
                _fail(reference, result)
            else:
                reference.set_result(result)
        if self._waiting and not self._num_open:
            self._send_soon()

    def _fail(self, numbers: list[int], error: Exception) -> None:
        for number in numbers:
            reference = self._taken(number)
            if reference is not None:
                _fail(reference, error)

    def _taken(self, number: int) -> Reference | None:
        """Who waits for the call's result, if anybody does; it waits no more."""
        if number not in self._waiting:
            return None
        reference, method, _ = self._waiting.pop(number)
        self._methods[method] -= 1
        return reference


def _fail(reference: Reference, error: Exception) -> None:
    if not reference.done():
        reference.set_exception(error)
        reference.exception()  # looked at: asyncio says nothing of one that nobody awaits


class Inbox:
    """The actor's end of one mailbox."""

    def __init__(self) -> None:
        self.running: dict[int, asyncio.Task[None]] = {}
        self._methods: Counter[str] = Counter()  # of those
        self.unwanted: set[int] = set()  # that still run, and whose kept values nobody needs any more
        self._early: dict[int, Letter] = {}
        self._next = 0
        self._open: deque[asyncio.Future[list[tuple[int, Any]]]] = deque()
        self._results: list[tuple[int, Any]] = []
        self._due = False

    def in_order(self, letter: Letter) -> Iterator[Letter]:
        """The letters whose turn has come, now that this one is here."""
        self._early[letter.order] = letter
        while self._next in self._early:
            self._next += 1
            yield self._early.pop(self._next - 1)

    async def results(self) -> list[tuple[int, Any]]:
        """What has come by number, as soon as there is any: what comes soon after it waits for nothing more."""
        given: asyncio.Future[list[tuple[int, Any]]] = asyncio.get_running_loop().create_future()
        self._open.append(given)
        if self._results:
            self._give_soon()
        return await given

    def begin(self, call: Call, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.running[call.number] = task
        self._methods[call.method] += 1
        task.add_done_callback(lambda _: self._end_unbegun(call))

    def _end_unbegun(self, call: Call) -> None:
        """A task that is cancelled before its first step ends nothing by itself."""
        if call.number in self.running:
            self.end(call, CallFailed.of(asyncio.CancelledError()))

    def end(self, call: Call, result: Any) -> None:
        del self.running[call.number]
        self.unwanted.discard(call.number)
        self._methods[call.method] -= 1
        self._results.append((call.number, result))
        if self._methods[call.method]:
            self._give_soon()
        else:
            self._give()

    def _give_soon(self) -> None:
        if not self._due:
            self._due = True
            asyncio.get_running_loop().call_later(GATHER_S, self._give)

    def _give(self) -> None:
        self._due = False
        if self._open and self._results:
            self._open.popleft().set_result(self._results)
            self._results = []
