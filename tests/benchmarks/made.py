"""Rooms that answer with made records: what is left to measure is the driver, and Ray between it and them.

Takes:  the arguments that engines and training ranks are built with.
Gives:  MadeEngine, MadeRank; `put_in_place`, which lets a run of this process build them.
Knows:  BENCH_HOLD_S: how long an engine holds a group, so that as many as the slots let in are in flight.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np

from flux_ray.config import Config
from flux_ray.records import FINISH_LENGTH, Prompt, RolloutGroup, StepReport, Trajectory
from flux_ray.weights.publish import CallEngines

HOLD_S = "BENCH_HOLD_S"
NUM_METRICS = 30  # as many as a training step of GRPO reports


class MadeEngine:
    """Answers each prompt with responses of rollout.max_tokens tokens, all alike."""

    def __init__(self, config: Config, *, index: int, **_: Any) -> None:
        self._config, self._version = config, 0

    async def start(self) -> dict[str, Any]:
        return {"context_length": 10**6}

    async def roll(self, prompt: Prompt, temperature: float | None) -> tuple[RolloutGroup, dict[str, int]]:
        await asyncio.sleep(float(os.environ[HOLD_S]))
        num_tokens = len(prompt.token_ids) + self._config.rollout.max_tokens
        mask = np.arange(num_tokens) >= len(prompt.token_ids)
        ids = np.where(mask, 5, 4).astype(np.int32)
        versions = np.where(mask, self._version, -1).astype(np.int32)
        made = [Trajectory(ids + i % 2, mask, np.full(num_tokens, -0.5, np.float32), versions, len(prompt.token_ids),
                           FINISH_LENGTH) for i in range(prompt.num_samples)]
        return RolloutGroup(prompt, tuple(made)), {"num_tokens": int(mask.sum()) * len(made), "num_spanning": 0}

    async def probe(self, prompt: Prompt) -> tuple[None, bool]:
        return None, True

    async def finish_weight_update(self, version: int) -> str:
        self._version = version
        return str(version)


class MadeRank:
    """Takes its groups as a rank does, and reports at once."""

    def __init__(self, config: Config, **_: Any) -> None: ...

    def prepare_wire(self) -> None: ...

    def connect(self, call: CallEngines, *, workers_per_engine: list[int], **_: Any) -> None:
        self._call, self._num_engines = call, len(workers_per_engine)

    def publish(self, version: int) -> list[str]:
        return self._call("finish_weight_update", [(version,)] * self._num_engines)

    def accumulate(self, **_: Any) -> None: ...

    def train_step(self, *, version: int, **_: Any) -> StepReport:
        return StepReport(version + 1, {f"actor/metric_{i}": 0.5 + i for i in range(NUM_METRICS)})

    def logprob_gap(self, groups: Any) -> tuple[float, float]:
        return 0.0, 0.0

    def save_model(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)


def put_in_place() -> None:
    """Runs of this process build these in the place of engines and training ranks."""
    from flux_ray.driver import build

    build.RolloutEngine, build.TrainingRank = MadeEngine, MadeRank  # type: ignore[misc, assignment]
