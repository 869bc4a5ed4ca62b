"""A run called from a program that has an event loop of its own: a notebook.

Takes:  a function of a Config.
Gives:  `outside_loop`: its result, computed here or in a thread.
Never:  leaves a run behind where the caller is interrupted.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from flux_ray.config import Config

Result = TypeVar("Result")
INTERRUPT_DEADLINE_S, LOOK_EVERY_S = 60.0, 0.2   # for a run in a thread to end its processes; between two looks at it


def outside_loop(function: Callable[[Config], Result], config: Config) -> Result:
    """function(config), called here, or in a thread of its own where an event loop runs in this one (a notebook).

    What it raises is raised here. Waits as long as the run takes: the driver, whose waits have deadlines, wakes it.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return function(config)
    outcome: Future[Result] = Future()

    def target() -> None:
        try:
            outcome.set_result(function(config))
        except BaseException as error:   # raised again in the caller's thread
            outcome.set_exception(error)

    thread = threading.Thread(target=target, name="flux_ray-run")
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:   # of this thread (a notebook's Stop), or the run's own, which has ended then
        _end_run_in(thread)
        raise


def _end_run_in(thread: threading.Thread) -> None:
    """The run in that thread ends as by Ctrl-C: what it started is gone when this returns."""
    from flux_ray import run as runs

    ends_s = time.monotonic() + INTERRUPT_DEADLINE_S
    while thread.is_alive() and time.monotonic() < ends_s:
        runs.interrupt(thread)   # of no effect before it has begun, and the second time
        thread.join(LOOK_EVERY_S)
