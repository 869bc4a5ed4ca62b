"""TensorBoard's event files, in RUN/tensorboard.

Takes:  metrics and evaluations.
Gives:  a scalar for each name; events as texts.
"""

from __future__ import annotations

from typing import ClassVar

from flux_ray.observability.monitors.monitor import Metrics, Monitor, Run


class TensorBoard(Monitor):
    module: ClassVar[str] = "tensorboard"
    package: ClassVar[str] = "'flux-ray[tensorboard]'"

    def started(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._last = run.first_step
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step or None)

    def step(self, step: int, metrics: Metrics) -> None:
        self._last = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def event(self, kind: str, text: str) -> None:
        self._writer.add_text(kind, text, self._last)

    def ended(self, how: str, why: str) -> None:
        self._writer.close()
