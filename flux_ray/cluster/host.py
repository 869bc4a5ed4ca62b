"""The Ray actor around one plain object.

Takes:  letters of calls by the names of methods, with handles anywhere in their arguments; single calls.
Gives:  `Host`.
Knows:  where a method runs, and where an actor's output goes.
Keeps:  the object, and the values that calls left to be fetched.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

from flux_ray import ports
from flux_ray.cluster.held import Shelf
from flux_ray.cluster.mail import Call, CallFailed, Inbox, Letter
from flux_ray.lifetime import end_with_parent


class Host:
    """Coroutines run on the loop; plain methods one after the other in one thread.

    So the loop lives through a long one, and its OpenMP pool is always the same.
    """

    def __init__(self, log_file: str, plugins: list[str]) -> None:
        redirect_output(log_file)
        # Ray asks a worker whose raylet died to end, but a room's threads may keep it from ending.
        end_with_parent()
        # The rooms talk to their log through logging; Ray and vLLM write to the file descriptors.
        logging.basicConfig(
            level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        from flux_ray.plugins import load_plugins

        load_plugins(plugins)
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._room: Any = None
        self._shelf = Shelf()
        self._inboxes: dict[str, Inbox] = {}

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is held for the room."""
        return ray.util.get_node_ip_address(), ports.reserve()

    async def ping(self) -> None:
        """Answered as long as nothing blocks the process."""

    async def live(self) -> None:
        """Never answered: its reference fails when the actor dies."""
        await asyncio.Event().wait()

    async def build(self, cls: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self._room = await loop.run_in_executor(self._thread, lambda: cls(**kwargs))

    @ray.method(enable_task_events=False)  # a letter is no task that anybody looks for in Ray's list
    async def post(self, letter: Letter) -> list[tuple[int, Any]]:
        """Begin the letter's calls; what has come since, of these calls or others, once there is any."""
        inbox = self._inboxes.setdefault(letter.box, Inbox())
        for each in inbox.in_order(letter):
            self._begin(each, inbox)
        return await inbox.results() if letter.waits else []

    def _begin(self, letter: Letter, inbox: Inbox) -> None:
        self._shelf.peers.update(letter.peers)
        for number in letter.cancelled:
            if number in inbox.running:
                inbox.running[number].cancel()
        for number in letter.forgotten:
            if number in inbox.running:
                inbox.unwanted.add(number)
            else:
                self._shelf.forget(letter.box, number)
        for call in letter.calls:
            inbox.begin(call, self._one(letter.box, call, inbox))

    async def _one(self, box: str, call: Call, inbox: Inbox) -> None:
        try:
            args, kwargs = await self._shelf.resolved((call.args, call.kwargs))
            result = await self.call(call.method, args, kwargs)
            if call.keeps:
                kept, result = result
                if call.number not in inbox.unwanted:
                    self._shelf.keep(box, call.number, kept)
        except BaseException as error:  # one that is cancelled too: somebody may wait for what cancelled itself
            result = CallFailed.of(error)
        inbox.end(call, result)

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        function = getattr(self._room, method)
        if inspect.iscoroutinefunction(function):
            return await function(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def fetch(self, box: str, numbers: list[int]) -> dict[int, Any]:
        """Of the values that these calls kept, those that are still here."""
        return self._shelf.those(box, numbers)

    async def close(self) -> None:
        close = getattr(self._room, "close", None)
        if close is not None:
            result = close()
            if inspect.isawaitable(result):
                await result


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
