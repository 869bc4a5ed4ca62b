"""Calls the monitors of a run, each in a thread of its own.

Takes:  what the Recorder tells; a way to warn.
Gives:  `Monitors`: the same calls as a Monitor's. None of them waits, but `ended`, and that for a bounded time.
Knows:  what a monitor raises is told once, with all of it in the log; one that can't start gets nothing more.
Keeps:  a bounded number of calls for a monitor that is slower than the run; what is too much is left out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

from flux_ray.observability.monitors.monitor import Metrics, Monitor, Run

log = logging.getLogger(__name__)

MOST_WAITING = 1000  # calls to one monitor
END_S = 60.0  # for all of them to write what is left

Job = Callable[[Monitor], None]


class Monitors:
    def __init__(self, monitors: Mapping[str, Monitor], *, warn: Callable[[str], None]) -> None:
        """`warn` is called from any thread."""
        self._driven = [_Driven(name, monitor, warn) for name, monitor in monitors.items()]

    def started(self, run: Run) -> None:
        self._tell("start", lambda monitor: monitor.started(run))

    def step(self, step: int, metrics: Metrics) -> None:
        self._tell(f"step {step}", lambda monitor: monitor.step(step, dict(metrics)))

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._tell(f"evaluation at step {step}", lambda monitor: monitor.evaluation(step, dict(metrics)))

    def event(self, kind: str, text: str) -> None:
        self._tell("event", lambda monitor: monitor.event(kind, text))

    def ended(self, how: str, why: str, *, within_s: float = END_S) -> None:
        """Waits until all have written what they were told, at most so long."""
        self._tell("end", lambda monitor: monitor.ended(how, why))
        end_s = time.monotonic() + within_s
        for driven in self._driven:
            driven.finish(max(end_s - time.monotonic(), 0.0))

    def _tell(self, what: str, job: Job) -> None:
        for driven in self._driven:
            driven.put(what, job)


class _Driven:
    """One monitor and its thread. The thread is a daemon: a monitor that hangs keeps no process alive."""

    def __init__(self, name: str, monitor: Monitor, warn: Callable[[str], None]) -> None:
        self._name, self._monitor, self._warn = name, monitor, warn
        self._jobs: queue.Queue[tuple[str, Job] | None] = queue.Queue(MOST_WAITING)
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"monitor-{name}", daemon=True)
        self._thread.start()

    def put(self, what: str, job: Job | None) -> None:
        try:
            self._jobs.put_nowait((what, job) if job is not None else None)
        except queue.Full:
            self._tell_once(f"is slower than the run: {what} and others are left out")

    def finish(self, within_s: float) -> None:
        self.put("end", None)
        self._thread.join(within_s)
        if self._thread.is_alive():
            self._tell_once(f"had not written all that it was told {within_s:.0f} s after the run's end")

    def _work(self) -> None:
        dead = False
        while (told := self._jobs.get()) is not None:
            what, job = told
            if dead:
                continue
            try:
                job(self._monitor)
            except Exception as error:  # a library, or a user's code, may raise anything
                dead = what == "start"
                log.exception("monitor %s, %s", self._name, what)
                after = "it gets nothing more" if dead else "the run goes on, and this is told once"
                self._tell_once(f"failed at {what}: {type(error).__name__}: {' '.join(str(error).split())}; {after}")

    def _tell_once(self, text: str) -> None:
        if not self._told:
            self._told = True
            self._warn(f"monitor {self._name} {text}")
