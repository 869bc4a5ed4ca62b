"""Actor groups of objects in this process, and the smallest rooms that a loop can run on.

Gives:  `LocalGroup`; `policy_rooms`: a sampler of made groups, a scorer by table, a reference and a trainer that note
        what they are given.
"""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flux_ray.driver.rooms import PolicyRooms

from flux_ray.cluster.group import ActorError
from flux_ray.config import Config
from flux_ray.records import FINISH_STOP, Prompt, RolloutGroup, ScoredGroup, StepReport, Trajectory
from flux_ray.rollout.engine import RolloutEngine


class LocalGroup:
    """Obeys cluster.group.ActorGroup."""

    def __init__(self, role: str, objects: list[Any]) -> None:
        self.role, self._objects = role, objects

    @property
    def size(self) -> int:
        return len(self._objects)

    def submit(self, index: int, method: str, *args: Any, num_returns: int = 1, **kwargs: Any) -> Any:
        async def run() -> Any:
            result = getattr(self._objects[index], method)(*args, **kwargs)
            return await result if inspect.isawaitable(result) else result

        task = asyncio.ensure_future(run())
        if num_returns == 1:
            return task

        async def part(i: int) -> Any:
            return (await task)[i]

        return [asyncio.ensure_future(part(i)) for i in range(num_returns)]

    async def result(self, reference: Any, *, index: int, what: str, deadline_s: float) -> Any:
        try:
            async with asyncio.timeout(deadline_s):
                return await reference
        except ArithmeticError as error:
            raise ActorError(f"{self.role} {index}: {what}: {error}", role=self.role, index=index) from error

    def cancel(self, reference: Any) -> None:
        reference.cancel()

    async def call(self, index: int, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> Any:
        started = self.submit(index, method, *args, **kwargs)
        return await self.result(started, index=index, what=method, deadline_s=deadline_s)

    async def call_watched(
        self, index: int, method: str, *args: Any, what: str, deadline_s: float, patience_s: float
    ) -> Any:
        return await self.result(self.submit(index, method, *args), index=index, what=what, deadline_s=deadline_s)

    def incarnation(self, index: int) -> Any:
        return self._objects[index]

    async def call_all(self, method: str, *args: Any, deadline_s: float, **kwargs: Any) -> list[Any]:
        return [await self.call(i, method, *args, deadline_s=deadline_s, **kwargs) for i in range(self.size)]


@dataclass
class Parts:
    """Engine, reward worker, reference and trainer in one object, and what each of them saw."""

    rewards_of: Any  # uid ► rewards of its samples, or an ArithmeticError to raise
    version: int = 0
    rolled: list[int] = field(default_factory=list)
    abandoned: list[int] = field(default_factory=list)  # whose request was cancelled
    seconds_of: Any = None  # Prompt ► how long its request takes; at once where it isn't given
    sampled: dict[int, list[int]] = field(default_factory=dict)  # uid ► the sampled token of each sample
    referenced: list[int] = field(default_factory=list)
    trained: list[list[int]] = field(default_factory=list)

    async def roll(self, prompt: Prompt, temperature: float | None) -> tuple[RolloutGroup, dict[str, int]]:
        self.rolled.append(prompt.uid)
        try:
            await asyncio.sleep(self.seconds_of(prompt) if self.seconds_of else 0)
        except asyncio.CancelledError:
            self.abandoned.append(prompt.uid)
            raise
        mask = np.array([False, False, True])
        versions = np.where(mask, self.version, -1).astype(np.int32)
        samples = [Trajectory(np.array([1, 2, (prompt.seed + i) % 97], np.int32), mask, np.zeros(3, np.float32),
                              versions, 2, FINISH_STOP) for i in range(prompt.num_samples)]
        return RolloutGroup(prompt, tuple(samples)), {"num_tokens": prompt.num_samples, "num_spanning": 0}

    async def join(self, prompt: Prompt, rolled: list[Any]) -> tuple[RolloutGroup, bool]:
        parts = [await part for part in rolled]
        return RolloutEngine.join(self, prompt, parts)  # type: ignore[arg-type]  # it needs nothing of an engine

    async def score(self, rolled: Any) -> ScoredGroup:
        group = await rolled
        rewards = self.rewards_of(group.prompt.uid)
        if isinstance(rewards, ArithmeticError):
            raise rewards
        values, size = np.array(rewards, float), len(rewards)
        return ScoredGroup(group.prompt.uid, values, values, {"made": values}, np.full(size, 3), np.full(size, 1),
                           np.zeros(size, bool), group.trajectories[0].oldest_version)

    async def logprobs_and_done(self, rolled: Any) -> tuple[list[np.ndarray], bool]:
        group = await rolled
        self.referenced.append(group.prompt.uid)
        return [np.zeros(3, np.float32) for _ in group.trajectories], True

    async def train_step(self, *, groups: Any, scores: list[ScoredGroup], version: int, **_: Any) -> StepReport:
        self.trained.append([score.uid for score in scores])
        for group in [await rolled for rolled in groups]:
            self.sampled[group.prompt.uid] = [int(t.token_ids[-1]) for t in group.trajectories]
        return StepReport(version + 1, {"actor/loss": 0.5})

    async def decode(self, rolled: Any) -> list[str]:
        return ["text" for _ in (await rolled).trajectories]

    async def probe(self, prompt: Prompt) -> tuple[RolloutGroup, bool]:
        group, _ = await self.roll(prompt, None)
        return group, True

    def logprob_gap(self, groups: list[RolloutGroup]) -> tuple[float, float]:
        return 0.0, float(len(groups))

    def publish(self, version: int) -> list[str]:
        self.version = version
        return [str(version)]


def policy_rooms(config: Config, parts: Parts) -> PolicyRooms:
    roles = {role: LocalGroup(role, [parts]) for role in ("reward", "reference", "trainer")}
    roles["engine"] = LocalGroup("engine", [parts] * config.rollout.num_engines)
    return PolicyRooms(config, engines=roles["engine"], rewards=roles["reward"], reference=roles["reference"],
                       trainer=roles["trainer"])
