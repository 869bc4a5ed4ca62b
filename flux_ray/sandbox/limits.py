"""Limits of a child process, which guard against accidents.

Takes:  a Limits.
Gives:  `apply`, in the child once it is ready; `begin_call`; `enter`, its folder and its output.
Knows:  the kernel holds a process to memory, CPU time, files and open files. What a child has started inherits these.
        The parent counts its processes and what it prints.
Never:  keeps out who wants to do harm: code may raise a soft limit again.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import tempfile
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)


@dataclass(frozen=True)
class Limits:
    """None: no limit."""

    memory_bytes: int | None = None  # of each process, beyond what the child has when it is ready
    cpu_s: float | None = None  # of one call in the main thread
    file_bytes: int | None = None  # of each file that is written
    open_files: int | None = None
    processes: int | None = None  # that the child has started, and these in their turn
    output_bytes: int | None = None  # that one call may print


def enter(folder: Path, output: int) -> None:
    """The process works in that folder, its temporary files too, and prints into the file descriptor `output`."""
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.chdir(folder)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # it may have been looked up before
    with contextlib.suppress(OSError, AttributeError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # a daemon that it starts stays beneath it


def apply(limits: Limits) -> None:
    _set(resource.RLIMIT_CORE, 0)
    if limits.memory_bytes is not None:
        _set(resource.RLIMIT_DATA, _data_bytes() + limits.memory_bytes)
    if limits.file_bytes is not None:
        _set(resource.RLIMIT_FSIZE, limits.file_bytes)
    if limits.open_files is not None:
        _set(resource.RLIMIT_NOFILE, limits.open_files)


def begin_call(limits: Limits) -> None:
    """A call has so much CPU time from now on."""
    if limits.cpu_s is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _set(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime + limits.cpu_s))


def _set(which: int, value: int) -> None:
    """The soft limit, never above the hard one: code that knows what it does may set it anew."""
    _, hard = resource.getrlimit(which)
    resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _data_bytes() -> int:
    """What RLIMIT_DATA counts so far. 0 where the kernel doesn't tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmData:"):
                return int(line.split()[1]) * 1024
    return 0
