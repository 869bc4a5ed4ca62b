"""Actors that compute nothing and answer with made records: what is left is the driver, and Ray between it and them.

Takes:  the arguments that engines and training ranks are built with.
Gives:  InstantEngine, InstantRank and their like; `put_in_place`, which lets a run of this process build them.
Knows:  what a protocol has and a class here doesn't is there, and answers None.
        BENCH_HOLD_S: how long an engine holds a group, so that as many as the slots let in are in flight.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flux_ray.cluster.group import all_within
from flux_ray.config import Config
from flux_ray.messages import Attested, GroupAt
from flux_ray.protocols import Engine, ReferenceScorer, RewardScorer, TrainingRank
from flux_ray.records import (
    FINISH_LENGTH,
    ComparedTokens,
    Completion,
    Responses,
    RolloutGroup,
    Sampled,
    SamplingRequest,
    Scores,
    StepReport,
)
from flux_ray.run.holder import Holder

HOLD_S = "BENCH_HOLD_S"
NUM_METRICS = 30  # as many as a training step of GRPO reports


class InstantEngine(Engine):
    """Answers each request with responses of its max_tokens tokens, all alike."""

    def __init__(self, config: Config, *, index: int, **_: Any) -> None:
        self._config, self._version, self._step = config, 0, 0

    async def meet(self, members: Any) -> None: ...

    async def start(self) -> None: ...

    async def start_for_training(self) -> None: ...

    async def context_length(self) -> int:
        return 10**6

    async def generate(self, request: SamplingRequest) -> Sampled:
        if not request.probes:
            await asyncio.sleep(float(os.environ[HOLD_S]))
        num = request.max_tokens
        made = [Completion(np.full(num, 5 + i % 2, np.int32), np.full(num, -0.5, np.float32),
                           np.full(num, self._version, np.int32), FINISH_LENGTH) for i in range(request.n)]
        return Sampled(tuple(made), self._step)

    async def finish_weight_update(self, version: int, step: int, sent: Mapping[str, int]) -> Attested:
        self._version, self._step = version, step
        return Attested(str(version))


class InstantReward(RewardScorer):
    """Scores each group at once, its samples unlike."""

    def __init__(self, config: Config, **_: Any) -> None: ...

    async def meet(self, members: Any) -> None: ...

    async def score(self, responses: Responses) -> Scores:
        values = np.arange(len(responses.texts), dtype=np.float64)
        return Scores(values, values, {"made": values})


class InstantReference(ReferenceScorer):
    def __init__(self, **_: Any) -> None: ...

    async def group_logprobs(self, groups: list[RolloutGroup]) -> list[list[np.ndarray]]:
        return [[np.full(t.num_tokens, -0.5, np.float32) for t in group.trajectories] for group in groups]


class InstantRank(TrainingRank):
    """Holds its groups as a rank does, and reports at once."""

    def __init__(self, config: Config, **_: Any) -> None:
        self._holder, self._engines = Holder(), []

    async def meet(self, members: Any) -> None:
        self._holder.members = members

    async def hold(self, groups: list[GroupAt]) -> list[GroupAt]:
        return await self._holder.hold(groups)

    def prepare_channel(self) -> None: ...

    async def connect(self, engines: list[Any], **_: Any) -> None:
        self._engines = engines

    async def publish(self, version: int, step: int) -> list[Attested]:
        return await all_within([engine.call(Engine.finish_weight_update, version, step, {})
                                 for engine in self._engines], 60.0)

    def accumulate_held(self, **_: Any) -> None: ...

    def train_held(self, *, step: int, **_: Any) -> StepReport:
        return StepReport(step + 1, {f"actor/metric_{i}": 0.5 + i for i in range(NUM_METRICS)})

    def compare_held(self, *, engines: Sequence[int]) -> list[ComparedTokens]:
        return []

    def save_model(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)


def put_in_place(*, rewards: bool = False) -> None:
    """Runs of this process build these in the place of engines and training ranks; `rewards`: and of what scores."""
    from flux_ray.run import build

    build.RolloutEngine, build.TrainingRank = InstantEngine, InstantRank  # type: ignore[misc, assignment]
    if rewards:
        build.RewardWorker, build.ReferencePolicy = InstantReward, InstantReference  # type: ignore[misc, assignment]
