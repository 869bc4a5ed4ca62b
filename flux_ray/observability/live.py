"""The live display of a run, where the terminal is one.

Takes:  each step's metrics, what its time went to, lines to show above.
Gives:  `Display`: progress with the time left, values with their trends. It stands below the lines, and is drawn anew.
Knows:  the terminal's width at each moment; the process's own output may be turned to the log.
Never:  raises where the terminal goes away; draws more than once a second beside the steps.
"""

from __future__ import annotations

import io
import itertools
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import TextIO, cast

from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

BLOCKS = "▁▂▃▄▅▆▇█"
KEPT = 240  # steps that a trend looks back
WIDE = 100  # columns from which trends are long
TREND = {True: 26, False: 10}  # columns of a trend, where it is wide and where not
BAR = {True: 40, False: 16}
EVERY_STEP_S = 0.1  # steps that come faster are drawn by the clock

#: Metric, label, format; of those with one label the first that is measured.
CELLS = (
    ("reward/mean", "reward", "{:.3f}"),
    ("train/loss", "loss", "{:.4g}"),  # without rollouts
    ("pairs/accuracy", "accuracy", "{:.3f}"),
    ("eval/task_mean", "evaluation", "{:.3f}"),
    ("eval/loss", "evaluation", "{:.4g}"),
    ("actor/grpo_kl", "kl", "{:.4f}"),
    ("actor/reward_kl", "kl", "{:.4f}"),
    ("actor/entropy", "entropy", "{:.3f}"),
    ("rollout/response_length_mean", "length", "{:.1f}"),
    ("rollout/truncated_frac", "truncated", "{:.1%}"),
    ("rollout/tokens_per_s", "tokens/s", "{:.0f}"),
)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks, the oldest first; of more than `width` values the mean of neighbours.

    >>> sparkline([0, 1, 2, 3], 4), sparkline([1, 1, 3, 3], 2), sparkline([5, 5], 4), sparkline([], 4)
    ('▁▃▆█', '▁█', '▁▁', '')
    """
    finite = [value for value in values if abs(value) < float("inf")]  # nan neither
    size = max(len(finite) / width, 1.0)
    ends = [round(size * i) for i in range(min(len(finite), width) + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in itertools.pairwise(ends) if b > a]
    if not means:
        return ""
    low, span = min(means), max(means) - min(means)
    return "".join(BLOCKS[round((len(BLOCKS) - 1) * (mean - low) / span) if span else 0] for mean in means)


def duration(seconds: float) -> str:
    """
    >>> duration(59.4), duration(3599), duration(90_000)
    ('59 s', '59:59', '25:00:00')
    """
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if not minutes:
        return f"{whole} s" if not hours else f"{hours}:00:{whole % 60:02}"
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


class Display:
    def __init__(self, stream: TextIO) -> None:
        self._console = _Console(stream)
        self._start_s = time.monotonic()
        self._step = self._num_steps = 0
        self._steps_s: deque[tuple[int, float]] = deque(maxlen=50)  # (steps done, when), for the time left
        self._values: dict[str, deque[float]] = {}
        self._most, self._step_s = "", 0.0
        self._live = Live(get_renderable=self._drawn, console=self._console, refresh_per_second=1,
                          redirect_stdout=False, redirect_stderr=False, vertical_overflow="crop")
        self._above = _Lines(self)

    @property
    def above(self) -> TextIO:
        """A stream whose lines stand above the display."""
        return cast(TextIO, self._above)

    def show(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def step(self, step: int, num_steps: int, metrics: dict[str, float]) -> None:
        """`step`: how many are done. The display begins with the first."""
        self._num_steps, self._step, now_s = num_steps, step, time.monotonic()
        drawn_s = self._steps_s[-1][1] if self._steps_s else 0.0
        self._steps_s.append((step, now_s))
        self._step_s = metrics.get("driver/step_s", 0.0)
        self.keep(metrics)
        if not self._live.is_started:
            self._live.start()
        if now_s - drawn_s >= EVERY_STEP_S or step == num_steps:
            self._live.refresh()

    def keep(self, metrics: dict[str, float]) -> None:
        """Values of the step, or of an evaluation."""
        for name, _, _ in CELLS:
            if name in metrics:
                self._values.setdefault(name, deque(maxlen=KEPT)).append(metrics[name])

    def time_went(self, most: str) -> None:
        self._most = most

    def close(self) -> None:
        """The last picture stays."""
        self._above.flush_rest()
        if self._live.is_started:
            self._live.stop()

    def _drawn(self) -> RenderableType:
        wide = self._console.width >= WIDE
        last = f"last step {self._step_s:.2f} s" + (f": {self._most}" if self._most else "")
        line = Text(last, style="dim", no_wrap=True, overflow="ellipsis")
        return Group(self._progress(wide), self._cells(wide), line)

    def _progress(self, wide: bool) -> RenderableType:
        done = round(BAR[wide] * self._step / max(self._num_steps, 1))
        text = Text.assemble(("━" * done, "green"), ("─" * (BAR[wide] - done), "dim"),
                             f"  step {self._step}/{self._num_steps}  ",
                             (f"{duration(time.monotonic() - self._start_s)}, {self._left()}", "dim"))
        text.no_wrap, text.overflow = True, "ellipsis"
        return text

    def _left(self) -> str:
        """By the last steps' pace, what is between them (evaluations, checkpoints) included."""
        if self._step >= self._num_steps:
            return "all steps are done"
        (first, first_s), (last, last_s) = self._steps_s[0], self._steps_s[-1]
        if last <= first:
            return "time left unknown"
        left_s = (last_s - first_s) / (last - first) * (self._num_steps - last) - (time.monotonic() - last_s)
        return f"{duration(max(left_s, 0.0))} left"

    def _cells(self, wide: bool) -> RenderableType:
        """Two cells a row, each a label, a value and its trend."""
        cells: dict[str, tuple[str, str]] = {}
        for name, label, form in CELLS:
            if self._values.get(name) and label not in cells:
                cells[label] = (form.format(self._values[name][-1]), sparkline(self._values[name], TREND[wide]))
        table = Table.grid(padding=(0, 1))
        for _ in range(2):
            table.add_column(style="dim", no_wrap=True)
            table.add_column(justify="right", no_wrap=True, min_width=7)
            table.add_column(style="cyan", no_wrap=True, min_width=TREND[wide] + 1)
        shown = [(label, *cell) for label, cell in cells.items()]
        for i in range(0, len(shown), 2):
            table.add_row(*shown[i], *(shown[i + 1] if i + 1 < len(shown) else ("", "", "")))
        return table


class _Console(Console):
    """On a stream whose terminal is asked for its size: the process's own streams may be files by now."""

    def __init__(self, stream: TextIO) -> None:
        self._terminal = stream
        super().__init__(file=cast(TextIO, _Forgiving(stream)), force_terminal=True, highlight=False, emoji=False,
                         markup=False)

    @property
    def size(self) -> ConsoleDimensions:
        try:
            columns, lines = os.get_terminal_size(self._terminal.fileno())
        except (OSError, ValueError, AttributeError):
            columns, lines = 80, 25
        return ConsoleDimensions(columns or 80, lines or 25)

    @size.setter
    def size(self, new: tuple[int, int]) -> None:
        """Nothing sets it: the terminal says it at each moment."""


class _Forgiving(io.TextIOBase):
    """Writes to the terminal until it goes away; the run goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    def write(self, text: str) -> int:
        try:
            if self._stream is not None:
                self._stream.write(text)
                self._stream.flush()
        except (OSError, ValueError):
            self._stream = None
        return len(text)


class _Lines(io.TextIOBase):
    """What is printed, line by line."""

    def __init__(self, display: Display) -> None:
        self._display, self._rest = display, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._display.show(line)
        return len(text)

    def flush_rest(self) -> None:
        if self._rest:
            self._display.show(self._rest)
            self._rest = ""
