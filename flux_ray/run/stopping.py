"""A run that is asked to end: its work is brought to a point that a resume goes on from, within seconds.

Takes:  the wish, by a signal or from another thread; the task that the run is.
Gives:  `Stopping`, which whoever works looks at; `Stopped`, which ends the work; what is told last.
Knows:  an orderly end is bounded: what doesn't answer is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from flux_ray.run import checkpoint
from flux_ray.signals import Interrupted

STEP_S = 10.0  # for a step that changes the weights to end
SAVE_S = 20.0  # for the last checkpoint
MODEL_S = 120.0  # for a model that is being saved, after the last step


class Stopped(Exception):
    """The work has ended as it was asked to."""


class Stopping:
    """Of one life of a run."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task, self._loop = task, asyncio.get_running_loop()
        self.asked = asyncio.Event()
        self._bound_s: float | None = 0.0  # None: the end is near anyway

    def ask(self) -> None:
        """From any thread, or from a signal's handler."""
        self._loop.call_soon_threadsafe(self._ask)

    def _ask(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
            if self._bound_s is not None:
                self._loop.call_later(self._bound_s, self._cancel)

    def _cancel(self) -> None:
        if self._bound_s is not None:
            self._task.cancel()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """What is done here ends by itself when it is asked to; else it is cancelled after that time."""
        before, self._bound_s = self._bound_s, seconds
        try:
            yield
        finally:
            self._bound_s = before

    def closing(self) -> None:
        """From now on all ends anyway, and nothing is cancelled."""
        self._bound_s = None


def told(error: Interrupted, checkpoints: Path, *, begun: int, done: int) -> Interrupted:
    """With what became of a run that had done `begun` steps when its process started, and `done` in the end."""
    saved = checkpoint.whole(checkpoints)
    if saved:
        step = int(saved[-1].name.removeprefix("step-"))
        lost = f", nothing of the {done - step} steps since" if done > step else ""
        text = f"step {step} is saved in {saved[-1]}{lost}; go on with resume={checkpoints.parent}"
    else:
        text = f"nothing was saved since step {begun}" if done > begun else "no step was done"
    return Interrupted(error.number, f"{error}: {text}")
