"""What a monitor of a run is.

Takes:  what happens in a run: its start, each step, each evaluation, events, its end.
Gives:  `Monitor`, to inherit from; `Run`, what it is told of the run at its start.
Knows:  a monitor is called in a thread of its own, one call after another: the run doesn't wait for it.
Never:  ends a run: what it raises is told once, as a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Run:
    folder: Path  # a monitor may keep its files there
    config: Mapping[str, object]  # dotted option ► value, secrets left out
    first_step: int  # steps that were done before this process began
    num_steps: int

    @property
    def name(self) -> str:
        return self.folder.name

    def kept_id(self, monitor: str, make: Callable[[], str]) -> str:
        """The id that `make` gave when the run first started in this folder with that monitor.

        A run that is resumed is then the same one for the service.
        """
        file = self.folder / f".{monitor}-id"
        if not file.is_file():
            file.write_text(make(), encoding="utf-8")
        return file.read_text(encoding="utf-8").strip()


class Monitor:
    """Inherit from this class, override what you want, and register it under a name.

    Examples:
        >>> class Longest(Monitor):
        ...     longest = 0.0
        ...     def step(self, step, metrics):
        ...         self.longest = max(self.longest, metrics["driver/step_s"])
        >>> monitor = Longest(); monitor.step(0, {"driver/step_s": 1.5}); monitor.longest
        1.5
    """

    #: The module that has to be importable, and what pip installs it by; empty: none.
    module: ClassVar[str] = ""
    package: ClassVar[str] = ""

    def started(self, run: Run) -> None:
        """Before the first step. Where this raises, the monitor gets nothing more."""

    def step(self, step: int, metrics: Metrics) -> None:
        """After training step `step` (from 0), with all that its line in metrics.jsonl holds."""

    def evaluation(self, step: int, metrics: Metrics) -> None:
        """After an evaluation, with its `eval/*`; `step` steps have been trained (0: before the first)."""

    def event(self, kind: str, text: str) -> None:
        """`kind` is `warning`, or `note` for what else the terminal shows in one line."""

    def ended(self, how: str, why: str) -> None:
        """`how` is done, interrupted or failed; `why` is empty for a run that is done."""
