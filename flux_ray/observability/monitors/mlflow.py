"""MLflow.

Takes:  metrics, evaluations and warnings; MLflow's own environment variables (MLFLOW_TRACKING_URI, …).
Gives:  an MLflow run named as the run's folder, which a resumed run goes on with.
Knows:  where MLFLOW_TRACKING_URI names no server, it writes into RUN/mlruns.
"""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

from flux_ray.observability.monitors.monitor import Metrics, Monitor, Run

EXPERIMENT = "flux_ray"  # where MLFLOW_EXPERIMENT_NAME names none
STATUS = {"done": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
MOST_LETTERS = 500  # of a parameter's value, and of a tag's
MOST_PARAMS = 100  # of one call


class Mlflow(Monitor):
    module: ClassVar[str] = "mlflow"
    package: ClassVar[str] = "'flux-ray[mlflow]'"

    def started(self, run: Run) -> None:
        # MLflow counts its users over the network otherwise.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        if "MLFLOW_TRACKING_URI" not in os.environ:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow refuses plain files unless it is told
        uri = os.environ.get("MLFLOW_TRACKING_URI") or (run.folder / "mlruns").as_uri()
        self._client: Any = MlflowClient(uri)
        self._id = run.kept_id("mlflow", lambda: self._new(run))
        self._client.update_run(self._id, status="RUNNING")  # a resumed one had ended

    def _new(self, run: Run) -> str:
        """The id of a new run that has the parameters: they can't be changed later."""
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        made = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        params = [Param(key, str(value)[:MOST_LETTERS]) for key, value in run.config.items()]
        for first in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(made, params=params[first : first + MOST_PARAMS])
        return made

    def step(self, step: int, metrics: Metrics) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(name, value, now_ms, step) for name, value in metrics.items()])

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self.step(step, metrics)

    def event(self, kind: str, text: str) -> None:
        if kind == "warning":
            self._client.set_tag(self._id, "last_warning", text[:MOST_LETTERS])

    def ended(self, how: str, why: str) -> None:
        if why:
            self._client.set_tag(self._id, "ended", f"{how}: {why}"[:MOST_LETTERS])
        self._client.set_terminated(self._id, STATUS[how])
