"""Ends vLLM's own processes where they stand still while requests wait: the engine then fails, and is replaced.

Takes:  whether anybody waits for them.
Knows:  a process that computes, or polls a GPU, uses processor time; one that is stopped or stuck uses none.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import psutil

from flux_ray.background import in_background
from flux_ray.clock import now_s

LOOK_EVERY_S = 2.0
STILL_S = 15.0  # without any processor time, while requests wait


def watch(is_awaited: Callable[[], bool]) -> asyncio.Task[None]:
    """Begins to watch, until the task is cancelled."""
    return in_background(end_if_still(is_awaited), lambda error: logging.getLogger(__name__).error(
        "nobody sees any more whether vLLM stands still", exc_info=error))


async def end_if_still(is_awaited: Callable[[], bool]) -> None:
    """For as long as the engine lives."""
    this = psutil.Process()
    used_s, since_s = -1.0, now_s()
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        processes = this.children(recursive=True)
        before_s, used_s = used_s, _used_s(processes)
        if used_s != before_s or not processes or not is_awaited():
            since_s = now_s()
        elif now_s() - since_s > STILL_S:
            logging.getLogger(__name__).error(
                "vLLM's processes stand still since %.0f s, while requests wait: they are ended", now_s() - since_s)
            _kill(processes)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _used_s(processes: list[psutil.Process]) -> float:
    used_s = 0.0
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            used_s += times.user + times.system
    return used_s
