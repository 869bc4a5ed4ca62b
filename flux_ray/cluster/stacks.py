"""Where a process stands: the Python stacks of actors that don't answer, for the log.

Takes:  the file that an actor writes its output to.
Gives:  `write_stacks`, into this process's log.
Knows:  py-spy comes with Ray. It reads another process's memory, and needs that one neither to answer nor to run.
Never:  fails, or takes longer than half a minute: it is asked where something has failed already.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import psutil

DEADLINE_S = 5.0  # for one process
IN_ALL_S = 20.0


def write_stacks(log_files: Collection[Path]) -> None:
    """Of the processes of this machine that write to these files, and of their children."""
    end_s = time.monotonic() + IN_ALL_S  # the event loop's clock is not for a thread
    for process in _writing_to({str(file) for file in log_files}):
        for one in (process, *_children(process)):
            if time.monotonic() > end_s:
                return
            with contextlib.suppress(psutil.Error):
                logging.getLogger(__name__).error("where process %d (%s) stands:\n%s", one.pid, one.name(),
                                                  _stack(one.pid))


def _writing_to(files: set[str]) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if os.readlink(f"/proc/{process.pid}/fd/1") in files and "ray::" in " ".join(process.cmdline()):
                yield process


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def _stack(pid: int) -> str:
    try:
        spy = str(Path(sys.executable).with_name("py-spy"))
        done = subprocess.run([spy, "dump", "--nonblocking", "--pid", str(pid)], capture_output=True, text=True,
                              timeout=DEADLINE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"(not known: {error})"
    return done.stdout or done.stderr
