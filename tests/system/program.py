"""`python -m flux_ray`, as a person starts it: what it printed, how it ended, which processes it has.

Takes:  overrides of the command line.
Gives:  Program: wait for a line, send a signal, wait for the end; its processes, found by a mark in their environment;
        `sessions_of` some processes; of sessions the `living` processes, and what is `open_to_others`.
Never:  leaves a process behind: `end_all` kills what carries the mark.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).parents[2]
START_DEADLINE_S = 300  # beside other tests on two cores
GONE_DEADLINE_S = 15  # from the end of a run to that of its last process
MARK = "FLUX_RAY_TEST_RUN"
NUMBERS = ("actor/loss", "train/grad_norm", "reward/mean", "actor/entropy", "rollout/response_length_mean")


class Program:
    """One run of the command line (or of another program), in a process group of its own as a shell makes it."""

    def __init__(self, arguments: list[str], *, folder: Path, program: tuple[str, ...] = ("-m", "flux_ray", "train"),
                 **environment: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._mark = secrets.token_hex(8)
        self._output = folder / "terminal.txt"
        kept = {key: value for key, value in os.environ.items()
                if key == "RAY_worker_niceness" or not key.startswith(("RAY_", "VLLM_"))}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with self._output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments], stdout=output, stderr=subprocess.STDOUT, cwd=folder,
                env={**kept, "PATH": path, "PYTHONPATH": str(REPO), MARK: self._mark, **environment},
                start_new_session=True,
            )

    @property
    def shown(self) -> str:
        """The terminal so far."""
        return self._output.read_text()

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def named(self, text: str) -> psutil.Process:
        """The one process of the run whose command line has `text`."""
        (found,) = [process for process in self.processes() if text in " ".join(process.cmdline())]
        return found

    def wait_for(self, pattern: str, *, deadline_s: float = START_DEADLINE_S) -> None:
        """Until the terminal shows it. The run must not end before."""
        self._wait(lambda: re.search(pattern, self.shown), repr(pattern), deadline_s)

    def wait_for_steps(self, number: int, *, run_dir: Path, deadline_s: float = START_DEADLINE_S) -> None:
        """Until the run has done so many: the terminal doesn't show each one. The run must not end before."""
        file = run_dir / "metrics.jsonl"
        self._wait(lambda: file.is_file() and file.read_text().count("\n") >= number, f"{number} steps", deadline_s)

    def _wait(self, condition: Callable[[], Any], what: str, deadline_s: float) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.shown}"
            assert time.monotonic() < end, f"no {what} within {deadline_s} s:\n{self.shown}"
            time.sleep(0.1)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self, *, deadline_s: float = START_DEADLINE_S) -> int:
        """The exit code; then no process of the run may be left after a while."""
        code = self.process.wait(deadline_s)
        end = time.monotonic() + GONE_DEADLINE_S
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        assert left == [], f"{[p.cmdline()[:3] for p in left]} left after the run ended with {code}"
        return code

    def end_all(self) -> None:
        for process in self.processes():
            process.kill()
        self.process.wait(10)


def sessions_of(processes: list[psutil.Process]) -> set[int]:
    sessions = set()
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            sessions.add(os.getsid(process.pid))
    return sessions


def living(sessions: set[int]) -> list[str]:
    """The command lines of those that are in these sessions."""
    found = []
    for process in _in(sessions):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline())[:80])
    return found


def open_to_others(sessions: set[int]) -> list[str]:
    """Addresses beyond this machine that processes of these sessions listen on."""
    found = []
    for process in _in(sessions):
        with contextlib.suppress(psutil.Error):
            found += [f"{process.name()} {connection.laddr}" for connection in process.net_connections("inet")
                      if connection.status == psutil.CONN_LISTEN
                      and not ipaddress.ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback]
    return found


def _in(sessions: set[int]) -> Iterator[psutil.Process]:
    """Whatever their environment: Ray's agents change theirs."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) in sessions and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def actor_of(log_file: Path, *, deadline_s: float = 60.0) -> psutil.Process:
    """The process of the Ray actor that writes to this log, once it is there."""
    until_s = time.monotonic() + deadline_s
    while time.monotonic() < until_s:
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/fd/1") == str(log_file) and "ray::" in " ".join(process.cmdline()):
                    return process
            except (OSError, psutil.Error):
                continue
        time.sleep(0.1)
    raise AssertionError(f"no actor that writes to {log_file}")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def numbers(lines: list[dict[str, Any]]) -> list[tuple[float, ...]]:
    """What two runs of one seed must share exactly: step, loss, gradient, reward, entropy, length."""
    return [(line["step"], *(line[name] for name in NUMBERS)) for line in lines]
