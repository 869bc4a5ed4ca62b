"""The Ray actor around one plain object, and how arguments reach it.

Takes:  calls by the name of a method, with references anywhere in their arguments.
Gives:  `Host`; `take`, the caller's end of the arguments.
Knows:  that Ray resolves references only at the top level of a call; where an actor's output goes.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray

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

    def address(self) -> tuple[str, int]:
        """This node's address and a port that is free now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    async def ping(self) -> None:
        """Answered as long as nothing blocks the process."""

    async def live(self) -> None:
        """Never answered: its reference fails when the actor dies."""
        await asyncio.Event().wait()

    async def build(self, cls: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self._room = await loop.run_in_executor(self._thread, lambda: cls(**kwargs))

    async def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any], *references: Any) -> Any:
        """`references` are arguments that Ray has resolved; `_Placed` marks where they go (see `RayGroup.submit`)."""
        args, kwargs = fill(args, references), fill(kwargs, references)
        function = getattr(self._room, method)
        if inspect.iscoroutinefunction(function):
            return await function(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))

    async def close(self) -> None:
        close = getattr(self._room, "close", None)
        if close is not None:
            result = close()
            if inspect.isawaitable(result):
                await result


class _Placed:
    """Stands in for the n-th reference inside nested arguments: Ray resolves references only at the top level."""

    def __init__(self, index: int) -> None:
        self.index = index


def take(value: Any, references: list[Any]) -> Any:
    if isinstance(value, ray.ObjectRef):
        references.append(value)
        return _Placed(len(references) - 1)
    if isinstance(value, (list, tuple)):
        return type(value)(take(item, references) for item in value)
    if isinstance(value, dict):
        return {key: take(item, references) for key, item in value.items()}
    return value


def fill(value: Any, references: tuple[Any, ...]) -> Any:
    if isinstance(value, _Placed):
        return references[value.index]
    if isinstance(value, (list, tuple)):
        return type(value)(fill(item, references) for item in value)
    if isinstance(value, dict):
        return {key: fill(item, references) for key, item in value.items()}
    return value


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
