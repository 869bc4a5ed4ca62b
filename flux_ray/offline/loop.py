"""The loop without rollouts: completions, pairs or given groups in, a trained model out.

Takes:  the data, the training ranks and the reference's actors.
Gives:  trained weights, the metrics of each step and of each evaluation.
Knows:  what a step and an evaluation are for each kind of data.
Never:  needs an engine.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from flux_ray import run_dir
from flux_ray.accounts import Account
from flux_ray.config import BatchConfig, Config, PairsConfig
from flux_ray.data import GroupSource, PairSource, SftSource
from flux_ray.observability.reward_metrics import length_metrics, reward_metrics
from flux_ray.observability.run_folder import RunFolder
from flux_ray.observability.spans import Phases, Span
from flux_ray.offline.data import OfflineData
from flux_ray.offline.kept_reference import KeptReference
from flux_ray.offline.stages import OfflineStages
from flux_ray.protocols import LogprobSums
from flux_ray.records import LoopState, PreferencePair, Prompt, ScoredGroup, StepReport

MOST_NATS = 700.0  # e to this is still a float

T = TypeVar("T")

#: Metrics; no answers to show.
Evaluated = tuple[dict[str, float], list[dict[str, object]]]

#: A training metric ► the evaluation's; pairs/NAME is eval/NAME.
EVALUATED = {"train/loss": "eval/loss", "train/num_tokens": "eval/num_tokens"}


class Learner(Protocol):
    """Trains and evaluates on one kind of data."""

    async def step(self, step: int) -> StepReport:
        """Train step `step` (from 0)."""

    async def evaluate(self) -> dict[str, float] | None:
        """eval/* of the evaluation's data, measured as in a step; None where there are no data."""


class Examples:
    """Completions: next token."""

    def __init__(
        self, config: BatchConfig, stages: OfflineStages, train: SftSource, evaluation: SftSource | None,
    ) -> None:
        self._size, self._stages, self._train, self._evaluation = (
            config.prompts_per_step, stages, train, evaluation)

    async def step(self, step: int) -> StepReport:
        return await self._stages.sft_step(self._train.batch(step, self._size))

    async def evaluate(self) -> dict[str, float] | None:
        source = self._evaluation
        if source is None:
            return None
        metrics = await _of_each(source.all(), source.sizes, self._stages.sft_metrics)
        return metrics | {name.replace("/loss", "/perplexity"): perplexity(loss)
                          for name, loss in metrics.items() if name.endswith("/loss")}


class Pairs:
    """Preference pairs: their reference log-probs are asked once, where the objective has any."""

    def __init__(
        self, config: BatchConfig, stages: OfflineStages, train: PairSource, evaluation: PairSource | None,
        reference: KeptReference | None,
    ) -> None:
        self._size, self._stages, self._train, self._evaluation = (
            config.prompts_per_step, stages, train, evaluation)
        self._reference = reference

    async def step(self, step: int) -> StepReport:
        pairs = self._train.batch(step, self._size)
        return await self._stages.pair_step(pairs, await self._sums(pairs))

    async def evaluate(self) -> dict[str, float] | None:
        source = self._evaluation
        return await _of_each(source.all(), source.sizes, self._measured) if source else None

    async def _measured(self, pairs: list[PreferencePair]) -> dict[str, float]:
        return await self._stages.pair_metrics(pairs, await self._sums(pairs))

    async def _sums(self, pairs: list[PreferencePair]) -> list[LogprobSums] | None:
        return await self._reference.of(pairs) if self._reference else None


class Groups:
    """Groups with given rewards: the policy's own step, without a rollout before it."""

    def __init__(self, config: BatchConfig, stages: OfflineStages, train: GroupSource) -> None:
        self._size, self._stages, self._train = config.prompts_per_step, stages, train

    async def step(self, step: int) -> StepReport:
        groups = self._train.batch(step, self._size)
        report = await self._stages.group_step(groups, step=step)
        scored = [group.scored for group in groups]
        measured = reward_metrics(scored, "reward") | length_metrics(scored, "rollout")
        return StepReport(report.step, measured | report.metrics)

    async def evaluate(self) -> dict[str, float] | None:
        return None


async def _of_each(
    everything: list[T], sizes: Mapping[str, int], measure: Callable[[list[T]], Awaitable[dict[str, float]]],
) -> dict[str, float]:
    """eval/NAME of all of the evaluation's data; eval/SET/NAME of each set too, where sets have names."""
    metrics, start = _named(await measure(everything)), 0
    for set_name, size in sizes.items():
        if set_name:
            of_set = _named(await measure(everything[start : start + size]))
            metrics |= {name.replace("/", f"/{set_name}/", 1): value for name, value in of_set.items()}
        start += size
    return metrics


def perplexity(loss: float) -> float:
    """e to the mean of -log π over tokens, in nats; inf where a float is too small for it."""
    return math.exp(loss) if loss < MOST_NATS else math.inf


def _named(metrics: Mapping[str, float]) -> dict[str, float]:
    return {_evaluated(name): value for name, value in metrics.items()}


def _evaluated(name: str) -> str:
    """The name in an evaluation of a training step's metric."""
    return EVALUATED.get(name, name.replace("pairs/", "eval/", 1))


def make_learner(config: Config, *, data: OfflineData, stages: OfflineStages, folder: RunFolder) -> Learner:
    """The learner that goes with the data. `folder`: where the reference's log-probs are kept."""
    train, evaluation = data.train, data.evaluation
    if isinstance(train, GroupSource):
        return Groups(config.batch, stages, train)
    if isinstance(train, PairSource):
        assert evaluation is None or isinstance(evaluation, PairSource)
        reference = None
        if isinstance(config, PairsConfig) and not config.algo.reference_free:
            earlier = run_dir.run_of(config.resume) if config.resume else None
            path = str(config.reference.path or config.model.path)
            reference = KeptReference(folder, path=path, ask=stages.pair_reference, earlier=earlier)
        return Pairs(config.batch, stages, train, evaluation, reference)
    assert evaluation is None or isinstance(evaluation, SftSource)
    return Examples(config.batch, stages, train, evaluation)


class OfflineLoop:
    """Training without rollouts, a step at a time."""

    def __init__(self, learner: Learner, *, size: int, start: LoopState) -> None:
        """`size`: rows of a step."""
        self._learner, self._size, self.step = learner, size, start.step
        self.is_settled = False  # a step is nothing but the ranks' work
        self._phases = Phases()  # of the last step

    async def begin(self, tasks: asyncio.TaskGroup) -> None: ...

    def go_on(self) -> None: ...

    def end(self) -> None: ...

    async def train(self) -> dict[str, float]:
        start_s, self._phases = time.monotonic(), Phases()
        report = await self._phases.of("train", self._learner.step(self.step))
        self.step = report.step
        return report.metrics | {"driver/step_s": time.monotonic() - start_s, "driver/version": float(report.step)}

    async def evaluate(self) -> Evaluated | None:
        """Metrics, and no answers; None where there are no data to evaluate on."""
        start_s = time.monotonic()
        measured = await self._learner.evaluate()
        if measured is None:
            return None
        return measured | {"eval/s": time.monotonic() - start_s}, []

    def timeline(self) -> list[Span]:
        """Of the last step."""
        return self._phases.spans

    async def samples(self, count: int) -> list[tuple[Prompt, str, ScoredGroup]]:
        """Nothing was sampled."""
        return []

    def account(self) -> Account:
        """The rows of the last step, by their places in the order in which they are drawn."""
        drawn = self.step * self._size
        return Account(drawn, trained=tuple(range(drawn - self._size, drawn)))

    async def keep(self, state: LoopState, folder: Path) -> LoopState:
        """Nothing is finished before it is trained on."""
        return state

    @property
    def state(self) -> LoopState:
        return LoopState(self.step, self.step * self._size)
