"""Signals that end a program: the first one orderly, the second one at once.

Gives:  `taken`, in which signals are taken so; `asks`: who is asked to end first; `Interrupted`, which else is raised.
Knows:  Ctrl-C, SIGTERM (a scheduler's end, `ray job stop`) and SIGHUP (the terminal is gone). What is ignored from
        outside (nohup, a shell's background job) stays ignored.
Keeps:  the first signal, of this process: only its main thread can take signals.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_S = 0.1  # a terminal that closes tells a program twice: by the shell, and by the kernel
AT_ONCE = "ended at once by a second signal"


class Interrupted(KeyboardInterrupt):
    """A program that a signal ended: what became of its work, in one line."""

    def __init__(self, number: int = signal.SIGINT, text: str = "interrupted") -> None:
        super().__init__(text)
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells have it."""
        return 128 + self.number


@dataclass
class _Taken:
    """What has come, and who is asked."""

    stderr: int | None  # where the last line goes, in a program that leaves by itself
    first: int | None = None
    came_s: float = 0.0
    ask: Callable[[], object] | None = None
    kill: Callable[[], object] = lambda: None


_taken: _Taken | None = None


@contextlib.contextmanager
def taken(*, leave: bool = False) -> Iterator[None]:
    """Signals that end a program are taken as this module says. Within another such block it does nothing.

    `leave`: the second signal ends the process itself, with a line.
    """
    global _taken
    if _taken is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _taken = _Taken(os.dup(2) if leave else None)
    before = {number: signal.getsignal(number) for number in ENDING}
    _install()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if _taken.stderr is not None:
            os.close(_taken.stderr)
        _taken = None


def again() -> None:
    """A library has put a handler of its own in the place of ours."""
    if _taken is not None and threading.current_thread() is threading.main_thread():
        _install()


def _install() -> None:
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _come)


@contextlib.contextmanager
def asks(ask: Callable[[], object], *, kill: Callable[[], object]) -> Iterator[None]:
    """Within, the first signal calls `ask`, and raises nothing; `kill` is called at the second one.

    Of the main thread's run alone.
    """
    mine = _taken if threading.current_thread() is threading.main_thread() else None
    if mine is not None:
        mine.ask, mine.kill = ask, kill
        if mine.first is not None:  # a library that was being imported has caught what was raised
            ask()
    try:
        yield
    finally:
        if mine is not None:
            mine.ask, mine.kill = None, lambda: None


def came() -> bool:
    """Whether one has come."""
    return _taken is not None and _taken.first is not None


def first() -> int:
    """The signal that came; SIGINT where none did, but a caller's wish."""
    return _taken.first if _taken is not None and _taken.first is not None else signal.SIGINT


def _come(number: int, frame: FrameType | None) -> None:
    state = _taken
    if state is None:
        raise Interrupted(number)
    if state.first is None:
        state.first, state.came_s = number, time.monotonic()
        if state.ask is None:
            raise Interrupted(number)
        state.ask()
    elif number != state.first or time.monotonic() - state.came_s > SAME_S:
        _end_at_once(state, number)


def _end_at_once(state: _Taken, number: int) -> None:
    with contextlib.suppress(Exception):
        state.kill()
    if state.stderr is None:
        raise Interrupted(number, AT_ONCE)
    with contextlib.suppress(OSError):  # the terminal may be gone
        os.write(state.stderr, f"flux-ray: {AT_ONCE}\n".encode())
    os._exit(128 + number)
