"""What a program may do at each step of a run, in the driver's process.

Takes:  the metrics of a step or of an evaluation.
Gives:  `Callback`, to inherit from, and `as_callback` for a plain function; `Control`, by which it asks for something.
Never:  runs in another process; what it raises ends the run.
"""

from __future__ import annotations

from collections.abc import Callable

from flux_ray.errors import UserError

Metrics = dict[str, float]


class Control:
    """What a callback may ask the run for. A wish is met right after the step, or evaluation, it comes with."""

    def __init__(self) -> None:
        self._wishes: dict[str, str] = {}

    def stop(self, why: str = "") -> None:
        """End the run after this step, as after its last one: it is evaluated, and its model saved."""
        self._wishes["stop"] = why

    def save(self) -> None:
        """Save a checkpoint of this step."""
        self._wishes["save"] = ""

    def evaluate(self) -> None:
        """Evaluate after this step, where there are data to evaluate on."""
        self._wishes["evaluate"] = ""

    def take(self, wish: str) -> str | None:
        """Why it was asked for; None where it wasn't, and from the second time on."""
        return self._wishes.pop(wish, None)


class Callback:
    """Inherit from this class and override what you want. The run waits while a callback works.

    `self.control` asks the run to stop, to save a checkpoint or to evaluate.

    Examples:
        >>> class Best(Callback):
        ...     best = 0.0
        ...     def on_step(self, step, metrics):
        ...         self.best = max(self.best, metrics["reward/mean"])
        >>> best = Best(); best.on_step(0, {"reward/mean": 0.5}); best.best
        0.5
        >>> class Enough(Callback):
        ...     def on_step(self, step, metrics):
        ...         if metrics["reward/mean"] > 0.9:
        ...             self.control.stop("the reward is above 0.9")
    """

    control: Control = Control()  # the run puts its own here

    def on_step(self, step: int, metrics: Metrics) -> None:
        """After training step `step` (from 0), with all that its line in metrics.jsonl holds."""

    def on_evaluation(self, step: int, metrics: Metrics) -> None:
        """After an evaluation, with its `eval/*`; `step` steps have been trained (0: before the first)."""


class _OnStep(Callback):
    def __init__(self, function: Callable[[int, Metrics], None]) -> None:
        self._function = function

    def on_step(self, step: int, metrics: Metrics) -> None:
        self._function(step, metrics)


def as_callback(given: Callback | Callable[[int, Metrics], None]) -> Callback:
    """A Callback as it is; a function (step, metrics) as one that is called after each step. UserError for others."""
    if isinstance(given, Callback):
        return given
    if isinstance(given, type) or not callable(given):
        raise UserError(f"callbacks: {given!r} is neither a Callback nor a function of (step, metrics)")
    return _OnStep(given)
