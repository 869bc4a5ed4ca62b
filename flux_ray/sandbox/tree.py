"""A process and all that it has started.

Takes:  a process id.
Gives:  `descendants`; `kill_tree`.
Knows:  a child keeps beneath it what its own children leave behind, as long as it lives.
Never:  waits long: a kill is repeated a few times only.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil

MOST_ROUNDS = 20  # processes may start others while they are being killed


def descendants(pid: int) -> list[psutil.Process]:
    """Those that live, of any generation and session."""
    if not Path(f"/proc/{pid}/task/{pid}/children").exists():  # no Linux, or none that tells
        with contextlib.suppress(psutil.Error):
            return [one for one in psutil.Process(pid).children(recursive=True) if _lives(one)]
        return []
    found: list[psutil.Process] = []
    waiting = [pid]
    while waiting:
        children = _children(waiting.pop())
        waiting += children
        for child in children:
            with contextlib.suppress(psutil.Error):
                found.append(psutil.Process(child))
    return [one for one in found if _lives(one)]


def _children(pid: int) -> list[int]:
    """Threads have children of their own."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += map(int, (task / "children").read_text().split())
    return children


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def kill_tree(pid: int, known: Iterable[psutil.Process] = ()) -> None:
    """The leader of a session, the session, and what it started that has left it.

    `known`: what it was seen to have started. They count where it has died before, so that nobody can ask it.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGSTOP)  # stopped, it starts no more, and still keeps what its children leave behind
    for _ in range(MOST_ROUNDS):
        started = descendants(pid)
        _kill(started)
        if not started:
            break
    _kill(known)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGKILL)
    _kill_session(pid)


def _kill_session(session: int) -> None:
    """Those that have a process group of their own in the session."""
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if pid != session and os.getsid(pid) == session:
                os.kill(pid, signal.SIGKILL)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
