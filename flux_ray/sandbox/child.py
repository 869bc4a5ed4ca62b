"""What runs in a child: a handler of users' code, called in threads of its own or in the main thread.

Takes:  a socket to the parent; an entry point of ours, `module:function`, that makes the handler.
Gives:  `main`; `Ask`, by which a handler asks the parent while it runs.
Knows:  each call in a thread has an event loop of its own, so that one that blocks holds up no other. In the main
        thread a plain call is as in a script; coroutines share one loop, which goes on between plain calls.
Never:  outlives its parent, even while a call holds the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib
import inspect
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from flux_ray.errors import UserError
from flux_ray.sandbox.codec import decode, encode
from flux_ray.sandbox.limits import Limits, apply, begin_call, enter

PR_SET_PDEATHSIG = 1  # of prctl(2)
LENGTH = struct.Struct(">Q")  # before each message

#: Asks the parent something within a call; gives its answer.
Ask = Callable[[object], Awaitable[Any]]
#: handler(payload, ask) ► the call's value, or a coroutine of it.
Handler = Callable[[Any, Ask], Any]


class Confined(NamedTuple):
    """How a child is confined: its limits, its folder, where it prints."""

    limits: Limits
    folder: str
    output: Connection


def main(connection: socket.socket, entry: str, arguments: bytes, confined: Confined | None = None) -> None:
    """The child's whole life."""
    _die_with_parent()
    os.setsid()  # a group of its own: what it starts ends with it
    if confined is not None:
        enter(Path(confined.folder), confined.output.fileno())
        confined.output.close()
    _as_a_script()
    limits = Limits() if confined is None else confined.limits
    server = _Server(connection, limits)
    try:
        module, _, function = entry.partition(":")
        server.handler = getattr(importlib.import_module(module), function)(**decode(arguments))
    except BaseException as error:
        server.send("start failed", *_told(error))
        return
    if confined is not None:
        apply(limits)
    server.send("ready")
    threading.Thread(target=server.read, name="sandbox reader", daemon=True).start()
    server.serve_main_thread()


def _die_with_parent() -> None:
    """The fork server ends with the process that it serves, and the kernel then ends this one."""
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _as_a_script() -> None:
    """What is printed shows at once, whoever ends the process; its code may start processes, by any method."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # they are files here
    multiprocessing.current_process().daemon = False
    multiprocessing.set_start_method(None, force=True)  # it has been chosen by whoever started this process


class _Server:
    def __init__(self, connection: socket.socket, limits: Limits) -> None:
        self.handler: Handler = lambda payload, ask: None
        self._limits = limits
        self._connection = connection
        self._sending = threading.Lock()
        self._main_loop = asyncio.new_event_loop()
        self._in_main: asyncio.Queue[tuple[int, object] | None] = asyncio.Queue()  # of the loop
        self._queued: set[int] = set()  # calls that wait for the main thread, and are waited for
        self._running: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Task[object]]] = {}  # calls in threads
        self._asked: dict[int, Future[object]] = {}
        self._number = 0

    def send(self, *message: object) -> None:
        data = encode(message)
        with self._sending:
            self._connection.sendall(LENGTH.pack(len(data)) + data)

    def read(self) -> None:
        """Messages as they come, until the parent closes its end."""
        with self._connection.makefile("rb") as stream:
            while header := stream.read(LENGTH.size):
                kind, number, *rest = decode(stream.read(*LENGTH.unpack(header)))
                getattr(self, f"_on_{kind}")(number, *rest)
        self._main_loop.call_soon_threadsafe(self._in_main.put_nowait, None)

    def _on_call(self, number: int, payload: object, in_main_thread: bool) -> None:
        if in_main_thread:
            self._queued.add(number)
            self._main_loop.call_soon_threadsafe(self._in_main.put_nowait, (number, payload))
        else:
            threading.Thread(target=self._in_thread, args=(number, payload), daemon=True).start()

    def _on_cancel(self, number: int) -> None:
        if number in self._running:
            loop, task = self._running[number]
            with contextlib.suppress(RuntimeError):  # it has ended meanwhile
                loop.call_soon_threadsafe(task.cancel)
        self._queued.discard(number)

    def _on_answer(self, number: int, value: object) -> None:
        if number in self._asked:
            self._asked.pop(number).set_result(value)

    def _on_refusal(self, number: int, why: str) -> None:
        if number in self._asked:
            self._asked.pop(number).set_exception(RuntimeError(why))

    def serve_main_thread(self) -> None:
        """One plain call at a time, beside no coroutine; these go on while a call is waited for."""
        tasks: set[asyncio.Task[None]] = set()
        while (call := self._main_loop.run_until_complete(self._in_main.get())) is not None:
            number, payload = call
            if number not in self._queued:
                continue
            self._queued.discard(number)
            self.send("began", number)
            begin_call(self._limits)
            try:
                value = self.handler(payload, self._asker(number))
                if inspect.iscoroutine(value):
                    tasks.add(task := self._main_loop.create_task(self._beside(number, value)))
                    task.add_done_callback(tasks.discard)
                else:
                    self.send("result", number, value)
            except BaseException as error:
                self.send("raised", number, *_told(error))

    async def _beside(self, number: int, coroutine: Awaitable[object]) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running[number] = self._main_loop, task
        self.send("began", number)  # once more: others may have held up the loop
        try:
            self.send("result", number, await coroutine)
        except BaseException as error:
            self.send("raised", number, *_told(error))
        finally:
            del self._running[number]

    def _in_thread(self, number: int, payload: object) -> None:
        try:
            self.send("result", number, asyncio.run(self._one(number, payload)))
        except BaseException as error:
            self.send("raised", number, *_told(error))

    async def _one(self, number: int, payload: object) -> object:
        task = asyncio.current_task()
        assert task is not None
        self._running[number] = asyncio.get_running_loop(), task
        try:
            return await self.handler(payload, self._asker(number))
        finally:
            del self._running[number]

    def _asker(self, call: int) -> Ask:
        async def ask(payload: object) -> object:
            answer: Future[object] = Future()
            with self._sending:
                self._number += 1
                number = self._number
            self._asked[number] = answer
            self.send("ask", call, number, payload)
            return await asyncio.wrap_future(answer)

        return ask


def _told(error: BaseException) -> tuple[str, str, str, bool]:
    return type(error).__name__, str(error), "".join(traceback.format_exception(error)), isinstance(error, UserError)
