"""Work in a thread, beside an engine's forward passes.

Takes:  work that waits for the weight channel.
Gives:  `in_background`: a Future of its result.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Do the work in a thread, which doesn't keep the process from ending. The Future raises what it raised."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, daemon=True).start()
    return done
