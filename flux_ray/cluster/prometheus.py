"""A run's metrics as Ray's own, which Ray exports for Prometheus on every machine of its cluster.

Takes:  metrics and evaluations.
Gives:  one gauge, `ray_flux_ray_metric`, with the tags `run` and `metric`, and `ray_flux_ray_steps_done`.
Knows:  launch/grafana.json is a dashboard over them.
"""

from __future__ import annotations

from typing import Any

from flux_ray.observability.monitors import Monitor, Run
from flux_ray.observability.monitors.monitor import Metrics

METRIC, STEPS = "flux_ray_metric", "flux_ray_steps_done"


class Prometheus(Monitor):
    def started(self, run: Run) -> None:
        self._run = run.name
        self._gauges: tuple[Any, Any] | None = None

    def step(self, step: int, metrics: Metrics) -> None:
        self._set(metrics)
        self._made()[1].set(step + 1, tags={"run": self._run})

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._set(metrics)

    def _set(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._made()[0].set(value, tags={"run": self._run, "metric": name})

    def _made(self) -> tuple[Any, Any]:
        """Made at the first step: Ray is connected by then."""
        if self._gauges is None:
            from ray.util.metrics import Gauge

            self._gauges = (
                Gauge(METRIC, "A metric of a flux_ray run, as in metrics.jsonl", tag_keys=("run", "metric")),
                Gauge(STEPS, "Training steps that a flux_ray run has done", tag_keys=("run",)))
        return self._gauges
