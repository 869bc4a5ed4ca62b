"""What a person sees while a run goes on.

Takes:  phases that start and end, a step's metrics.
Gives:  calm lines, in the run's log too, below them a live display where the terminal is one; everything else that any
        library prints goes to the run's log.
Knows:  where the terminal was before the process's output was turned to the log.
Never:  prints a library's noise, or anything twice.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from flux_ray.observability.eval_metrics import HIGH, LOW
from flux_ray.observability.live import Display

log = logging.getLogger(__name__)

EVERY_S = 1.0  # lines of a kind that comes often: one in this time is shown

COUNTS = ("prompts", "failed", "num_tokens")  # of an evaluation

#: What a step's line shows: metric, label, format. Absent metrics are left out.
STEP_COLUMNS = (
    ("reward/mean", "reward", "{:.3f}"),
    ("actor/loss", "loss", "{:.4g}"),
    ("train/loss", "loss", "{:.4g}"),  # without rollouts
    ("pairs/accuracy", "accuracy", "{:.3f}"),
    ("pairs/margin", "margin", "{:.3f}"),
    ("rollout/response_length_mean", "length", "{:.1f}"),
    ("actor/entropy", "entropy", "{:.3f}"),
    ("actor/grpo_kl", "kl", "{:.4f}"),
    ("actor/reward_kl", "reward_kl", "{:.4f}"),  # of a sequence
    ("weights/logprob_gap_max", "gap", "{:.0e}"),
    ("rollout/tokens_per_s", "tok/s", "{:.0f}"),
    ("driver/step_s", "s", "{:.2f}"),
)


class Terminal:
    """The person's end of a run. With `enabled=False` it says nothing."""

    def __init__(self, stream: TextIO, *, enabled: bool) -> None:
        self._stream = stream
        self._enabled = enabled
        self._start = time.monotonic()
        self._display = _display(stream) if enabled else None
        self._shown_s: dict[str, float] = {}  # when a line of the kind was, last

    def say(self, text: str, *, level: int = logging.INFO) -> None:
        log.log(level, text)
        self._show(text)

    def say_of(self, kind: str, text: str, *, level: int = logging.INFO, in_any_case: bool = False) -> bool:
        """A line of a kind that comes often: the log gets all of them, the terminal one a second: whether this one."""
        log.log(level, text)
        now_s = time.monotonic()
        if in_any_case or now_s - self._shown_s.get(kind, -math.inf) >= EVERY_S:
            self._shown_s[kind] = now_s
            self._show(text)
            return True
        return False

    def _show(self, text: str) -> None:
        if not self._enabled:
            return
        line = f"[{clock(time.monotonic() - self._start)}] {text}"
        if self._display is not None:
            return self._display.show(line)
        try:
            print(line, file=self._stream, flush=True)
        except OSError:  # the reader (`| head`) or the terminal went away; the run goes on
            self._enabled = False

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """What is printed within, by a user's callback, reaches the person; elsewhere prints go to the log."""
        with contextlib.redirect_stdout(self._stream if self._display is None else self._display.above):
            yield

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        shown = {name.removeprefix("eval/"): value for name, value in metrics.items()
                 if name.startswith("eval/") and not name.endswith((LOW, HIGH))}
        if self._display is not None:
            self._display.keep(metrics)
        self.say(f"evaluation at step {step}: " + "  ".join(
            f"{name} {value:.0f}" if name in COUNTS else f"{name} {value:.3f}"
            for name, value in shown.items() if value or name != "failed"))

    def time_went(self, step: int, most: str) -> None:
        """`most`: what the step's time mostly went to."""
        if most:
            log.info("step %d: %s", step, most)
        if self._display is not None:
            self._display.time_went(most)

    def step(self, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        shown = [f"{label} {form.format(metrics[name])}" for name, label, form in STEP_COLUMNS if name in metrics]
        line = f"step {step:>{len(str(num_steps))}}/{num_steps}  " + "  ".join(shown)
        if self._display is None:
            self.say_of("step", line, in_any_case=step == num_steps)
        else:
            log.info(line)
            self._display.step(step, num_steps, metrics)

    def close(self) -> None:
        """Nothing is drawn any more; lines may yet be said."""
        if self._display is not None:
            self._display.close()
            self._display = None


def _display(stream: TextIO) -> Display | None:
    """None where the stream is no terminal, or one that can't move its cursor."""
    try:
        is_terminal = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    except ValueError:  # closed
        return None
    return Display(stream) if is_terminal else None


def clock(seconds: float) -> str:
    """Time since a run's start.

    >>> clock(61.25), clock(3600), clock(266_462)
    ('  61.2 s', ' 1:00:00', '74:01:02')
    """
    if seconds < 3600:
        return f"{seconds:6.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:2}:{minutes % 60:02}:{rest:02}"


@contextlib.contextmanager
def quiet(log: Path, *, progress: bool) -> Iterator[Terminal]:
    """Turn this process's output to `log` (and logging and warnings with it); the Terminal still reaches the person.

    Everything is as it was when the block ends, however it ends.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    streams = sys.stdout, sys.stderr
    # A stream that isn't the process's own (a notebook, a test's capture) goes on to show what the Terminal says.
    ours = _is_descriptor(streams[0], 1)
    file = log.open("a", buffering=1, encoding="utf-8")
    handler = logging.StreamHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    terminal = os.fdopen(os.dup(saved[0]), "w", buffering=1, encoding="utf-8") if ours else streams[0]
    sys.stdout = sys.stderr = file
    root.handlers[:], root.level = [handler], logging.INFO
    logging.captureWarnings(True)
    shown = Terminal(terminal, enabled=progress)
    try:
        with warnings.catch_warnings():
            yield shown
    finally:
        shown.close()
        logging.captureWarnings(False)
        root.handlers[:], root.level = handlers, level
        sys.stdout, sys.stderr = streams
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        os.close(saved[0])
        os.close(saved[1])
        if ours:
            with contextlib.suppress(OSError):
                terminal.close()
        file.close()


def _is_descriptor(stream: TextIO, number: int) -> bool:
    try:
        return stream.fileno() == number
    except (OSError, ValueError, AttributeError):
        return False
