"""What the children of the tests do.

Gives:  `make`, an entry point; its handler does what a call names.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

from flux_ray.errors import UserError


def make(*, refuses: bool = False) -> Any:
    if refuses:
        raise UserError("no such function")

    def in_main(payload: Any, ask: Any) -> Any:
        return {"is_main": threading.current_thread() is threading.main_thread(), "payload": payload}

    async def in_thread(payload: Any, ask: Any) -> Any:
        name, *rest = payload
        return await {"echo": echo, "blocks": blocks, "raises": raises, "asks": asks, "exits": exits,
                      "spawns": spawns}[name](ask, *rest)

    def handler(payload: Any, ask: Any) -> Any:
        return in_thread(payload, ask) if isinstance(payload, list) else in_main(payload, ask)

    return handler


async def echo(ask: Any, value: Any) -> Any:
    return value


async def blocks(ask: Any, seconds: float) -> str:
    time.sleep(seconds)  # noqa: ASYNC251 - that is what is tested
    return "blocked"


async def raises(ask: Any) -> None:
    raise KeyError("no such thing")


async def asks(ask: Any, count: int) -> list[Any]:
    return [await ask(i) for i in range(count)]


async def exits(ask: Any, code: int) -> None:
    os._exit(code)


async def spawns(ask: Any) -> None:
    """A grandchild in a session of its own, told of by its number; then for ever."""
    started = subprocess.Popen(  # noqa: ASYNC220 - that is what is tested
        [sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    await ask(started.pid)
    time.sleep(600)  # noqa: ASYNC251
