"""trackio, which keeps its data on this machine (TRACKIO_DIR) and shows it by `trackio show`.

Takes:  metrics, evaluations and warnings; trackio's own environment variables.
Gives:  a trackio run named as the run's folder, which a resumed run goes on with.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

from flux_ray.observability.monitors.monitor import Metrics, Monitor, Run

PROJECT = "flux_ray"  # where TRACKIO_PROJECT names none


class Trackio(Monitor):
    module: ClassVar[str] = "trackio"
    package: ClassVar[str] = "'flux-ray[trackio]'"

    def started(self, run: Run) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run: Any = trackio.init(project=project, name=run.kept_id("trackio", lambda: run.name), resume="allow",
                                      config=dict(run.config), embed=False)

    def step(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._run.log(dict(metrics), step=step)

    def ended(self, how: str, why: str) -> None:
        self._run.finish()
