"""A child process that runs users' code, as its parent knows it.

Takes:  an entry point that makes the child's handler; calls, each with who answers what it asks meanwhile.
Gives:  `Child`: start, call, kill; `warm_up`: the fork server, with what children need imported already.
Knows:  a child that ends, or is ended, fails the calls that run in it and nothing else. With limits it has a temporary
        folder of its own, and its output comes through this process.
Never:  blocks the event loop, whatever the child does; leaves a process of the child's behind.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import signal
import socket
import sys
import threading
import types
from collections.abc import Awaitable, Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import psutil

from flux_ray.background import in_background
from flux_ray.cluster.group import CallFailed
from flux_ray.errors import UserError
from flux_ray.held_folder import HeldFolder
from flux_ray.sandbox import child as child_module
from flux_ray.sandbox.child import LENGTH
from flux_ray.sandbox.codec import decode, encode
from flux_ray.sandbox.limits import Limits
from flux_ray.sandbox.output import Output
from flux_ray.sandbox.tree import descendants, kill_tree

SENTINEL_LOOK_S = 1.0  # for the exit code of a child whose socket has closed
#: A start looks at all other children, too. Of two threads that look at one, the second finds its exit code read: 255.
_one_at_a_time = threading.Lock()
SCRATCH = "flux_ray-child-"  # what the folder of a child's temporary files is called
LOOK_EVERY_S = 0.2  # at the processes that a call has started

#: Answers what a call asks.
Answer = Callable[[Any], Awaitable[object]]


async def no_answer(payload: object) -> object:
    """The Answer to a call that asks nothing."""
    raise RuntimeError("nobody answers here")


class ChildEnded(RuntimeError):
    """The process ended, by itself or because somebody killed it, while a call ran in it."""


class Entry(NamedTuple):
    """What makes the handler in the child: `module:function`, called with these arguments."""

    function: str
    arguments: dict[str, object]


def warm_up(modules: Sequence[str]) -> None:
    """Start the fork server of this process, which imports `modules` once for all children."""
    forkserver.set_forkserver_preload([child_module.__name__, *modules])
    forkserver.ensure_running()


class Child:
    """Use `Child.start`. Calls may run side by side."""

    def __init__(
        self, process: BaseProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter,
        limits: Limits | None = None,
    ) -> None:
        self._process, self._reader, self._writer, self._limits = process, reader, writer, limits
        self._output: Output | None = None
        self._scratch: HeldFolder | None = None
        self._numbers = itertools.count()
        self._calls: dict[int, asyncio.Future[object]] = {}
        self._answers: dict[int, Answer] = {}  # who answers what a call asks
        self._asking: dict[int, set[asyncio.Task[None]]] = {}  # of a call
        self._began: dict[int, Callable[[], None]] = {}  # to be told that a call has begun
        self.why_ended = ""
        self._reading: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._started: dict[int, psutil.Process] = {}  # processes that it was seen to have started

    @classmethod
    async def start(cls, entry: Entry, *, deadline_s: float, limits: Limits | None = None) -> Child:
        """A child that is ready for calls. Raises what the entry raised there, ChildEnded, TimeoutError."""
        child = await cls._begun(entry, limits)
        try:
            async with asyncio.timeout(deadline_s) as limit:
                kind, *rest = await child._message()
        except BaseException as error:
            child.kill(f"it did not start within {deadline_s:g} s" if limit.expired() else str(error))
            raise
        if kind == "start failed":
            child.kill("it could not start")
            raise _raised(*rest)
        child._reading = asyncio.create_task(child._read())
        return child

    @classmethod
    async def _begun(cls, entry: Entry, limits: Limits | None) -> Child:
        """A child whose process runs."""
        ours, its = socket.socketpair()
        confined: child_module.Confined | None = None
        scratch: HeldFolder | None = None
        printed: Connection | None = None
        prints: Connection | None = None
        if limits is not None:
            scratch = HeldFolder(SCRATCH)
            printed, prints = multiprocessing.Pipe(duplex=False)
            confined = child_module.Confined(limits, str(scratch.folder), prints)
        process = multiprocessing.get_context("forkserver").Process(
            target=child_module.main, args=(its, entry.function, encode(entry.arguments), confined), daemon=True)
        try:
            await asyncio.to_thread(_start, process)
        except BaseException:
            if scratch is not None:
                scratch.remove()
            raise
        finally:
            its.close()
            if prints is not None:
                prints.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        child = cls(process, reader, writer, limits)
        child._scratch = scratch
        if printed is not None and limits is not None:
            child._output = await Output.of(printed, most_bytes=limits.output_bytes)
        return child

    @property
    def ended(self) -> bool:
        return bool(self.why_ended)

    async def call(
        self, payload: object, *, answer: Answer = no_answer, in_main_thread: bool = False,
        began: Callable[[], None] = lambda: None,
    ) -> Any:
        """The handler's value. `in_main_thread`: one call at a time, as in a script, else in a thread of its own.

        `began`: called when its turn in the main thread has come. Raises what `answer` raises; CallFailed (or
        UserError) for what the handler raises; ChildEnded. Whoever waits sets the deadline; whoever is cancelled
        cancels the call.
        """
        if self.ended:
            raise ChildEnded(self.why_ended)
        number = next(self._numbers)
        result: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._calls[number], self._answers[number], self._asking[number] = result, answer, set()
        self._began[number] = began
        try:
            self._send("call", number, payload, in_main_thread)
            self._watch()
            return await result
        except BaseException:
            if not self.ended:
                self._send("cancel", number)  # of no effect on one that has raised
            raise
        finally:
            for asking in self._asking.pop(number):
                asking.cancel()
            del self._calls[number], self._answers[number], self._began[number]

    def kill(self, why: str) -> None:
        """End the child and all that it started; the calls that run in it fail with `why`."""
        if self.ended:
            return
        self.why_ended = why
        assert self._process.pid is not None
        kill_tree(self._process.pid, self._started.values())
        self._writer.close()
        for task in (self._reading, self._watching):
            if task is not None:
                task.cancel()
        if self._output is not None:
            self._output.close()
        if self._scratch is not None:
            threading.Thread(target=self._scratch.remove, name="scratch").start()  # there may be many files
        for result in self._calls.values():
            if not result.done():
                result.set_exception(ChildEnded(why))

    def _watch(self) -> None:
        """Count the child's processes, as long as calls run in it."""
        if self._limits is not None and (self._watching is None or self._watching.done()):
            self._watching = in_background(self._count_processes(), lambda error: self.kill(
                f"its processes could not be counted: {error}"))

    async def _count_processes(self) -> None:
        assert self._limits is not None and self._process.pid is not None
        most = self._limits.processes
        while self._calls:
            await asyncio.sleep(LOOK_EVERY_S)
            started = descendants(self._process.pid)
            self._started = {one.pid: one for one in started} | {
                one.pid: one for one in self._started.values() if one.is_running()}
            if most is not None and len(started) > most:
                why = f"the process in which it ran had started {len(started)} others, more than {most}, and was ended"
                asyncio.get_running_loop().call_soon(self.kill, why)
                return

    def _send(self, *message: object) -> None:
        data = encode(message)
        self._writer.write(LENGTH.pack(len(data)) + data)  # buffered: the child may read it when it likes

    async def _message(self) -> list[Any]:
        try:
            (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
            return decode(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            raise ChildEnded(await self._why()) from None

    async def _why(self) -> str:
        code = await asyncio.to_thread(_exit_code, self._process)
        if code is None:
            return "the process in which it ran closed its connection"
        if code == -signal.SIGXCPU:
            return "the process in which it ran had no CPU time left and was ended"
        return f"the process in which it ran {f'was ended by signal {-code}' if code < 0 else f'exited with {code}'}"

    async def _read(self) -> None:
        """Messages as they come. A child whose own children keep its socket open is seen to end all the same."""
        ending = asyncio.get_running_loop().create_future()
        sentinel = self._process.sentinel
        handlers: dict[str, Callable[..., None]] = {
            "ask": self._on_ask, "began": self._on_began, "result": self._on_result, "raised": self._on_raised}
        asyncio.get_running_loop().add_reader(sentinel, _settle, ending)
        try:
            while True:
                message = asyncio.ensure_future(self._message())
                message.add_done_callback(_looked_at)
                await asyncio.wait({message, ending}, return_when=asyncio.FIRST_COMPLETED)
                if not message.done():
                    message.cancel()
                    raise ChildEnded(await self._why())
                kind, number, *rest = message.result()
                handlers[kind](number, *rest)
        except Exception as error:  # it has ended, or says what nobody understands
            why = str(error) if isinstance(error, ChildEnded) else f"its process sent what can't be read: {error}"
            asyncio.get_running_loop().call_soon(self.kill, why)
        finally:
            asyncio.get_running_loop().remove_reader(sentinel)

    def _on_began(self, number: int) -> None:
        if self._output is not None:
            self._output.begin_call()
        if number in self._began:
            self._began[number]()

    def _on_result(self, number: int, value: object) -> None:
        if number in self._calls and not self._calls[number].done():
            self._calls[number].set_result(value)

    def _on_raised(self, number: int, *told: Any) -> None:
        if number in self._calls and not self._calls[number].done():
            self._calls[number].set_exception(_raised(*told))

    def _on_ask(self, number: int, question: int, payload: object) -> None:
        if number in self._calls:
            self._asking[number].add(asyncio.create_task(self._answer(number, question, payload)))
        else:  # it was cancelled before its thread had begun
            self._send("refusal", question, "nobody waits for this call any more")

    async def _answer(self, number: int, question: int, payload: object) -> None:
        try:
            value = await self._answers[number](payload)
            if not self.ended:
                self._send("answer", question, value)
        except Exception as error:  # not the handler's to see: the call fails with it here
            if not self.ended:
                self._send("refusal", question, str(error))
            if number in self._calls and not self._calls[number].done():
                self._calls[number].set_exception(error)


def _start(process: BaseProcess) -> None:
    """Start it without this process's script, which multiprocessing would run again in the child.

    What it defines is imported there by its file, as from any other process.
    """
    with _one_at_a_time:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            process.start()
        finally:
            sys.modules["__main__"] = script


def _exit_code(process: BaseProcess) -> int | None:
    """Its exit code, once its end is seen; None where it goes on for SENTINEL_LOOK_S."""
    wait([process.sentinel], SENTINEL_LOOK_S)  # which reads nothing
    with _one_at_a_time:
        return process.exitcode


def _looked_at(message: asyncio.Future[Any]) -> None:
    if not message.cancelled():
        message.exception()  # a child may be killed while it is waited for: asyncio needn't tell of it


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _raised(name: str, text: str, where: str, by_user: bool) -> Exception:
    return UserError(text) if by_user else CallFailed(name, text, where)
