"""Weights & Biases.

Takes:  metrics, evaluations and warnings; W&B's own environment variables (WANDB_PROJECT, WANDB_MODE, …).
Gives:  a W&B run named as the run's folder, which a resumed run goes on with.
Knows:  without a key, and where WANDB_MODE says nothing, it writes offline into RUN/wandb: `wandb sync` sends it later.
"""

from __future__ import annotations

import os
import secrets
from typing import Any, ClassVar

from flux_ray.observability.monitors.monitor import Metrics, Monitor, Run

PROJECT = "flux_ray"  # where WANDB_PROJECT names none


class Wandb(Monitor):
    module: ClassVar[str] = "wandb"
    package: ClassVar[str] = "'flux-ray[wandb]'"

    def started(self, run: Run) -> None:
        import wandb

        # Without a key it would ask on the terminal for one.
        offline = "WANDB_MODE" not in os.environ and not wandb.login(prompt=False, verify=False)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=os.environ.get("WANDB_NAME", run.name),
            id=run.kept_id("wandb", lambda: secrets.token_hex(4)), resume="allow", dir=str(run.folder),
            config=dict(run.config), mode="offline" if offline else None,
            settings=wandb.Settings(silent=True, console="off"))
        # Steps that are done again after a fault would be refused on W&B's own axis, which only rises.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **metrics})

    def evaluation(self, step: int, metrics: Metrics) -> None:
        self._run.log({"step": step, **metrics})

    def event(self, kind: str, text: str) -> None:
        if kind == "warning":
            self._run.alert(title="flux_ray: warning", text=text, level="WARN")

    def ended(self, how: str, why: str) -> None:
        self._run.summary["ended"] = f"{how}: {why}" if why else how
        self._run.finish(exit_code=0 if how == "done" else 1)
