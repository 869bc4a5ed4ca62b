"""The short loop: completions, pairs or given groups in, a trained model out.

Takes:  the data, the training ranks and the reference's actors, a place to write to.
Gives:  trained weights, a line of metrics a step, checkpoints, evaluations.
Knows:  for each kind of data, what one step and one evaluation are.
Never:  needs an engine.
"""

from __future__ import annotations

import time
from typing import Protocol

from flux_ray import algo, run_dir
from flux_ray.config import Config
from flux_ray.data import GroupSource, PairSource, SftSource
from flux_ray.driver import state as saved
from flux_ray.driver.kept_reference import KeptReference, Sums
from flux_ray.driver.measure import length_metrics, reward_metrics
from flux_ray.driver.offline_data import OfflineData
from flux_ray.driver.offline_rooms import OfflineRooms
from flux_ray.driver.recorder import Recorder
from flux_ray.driver.state import LoopState
from flux_ray.records import PreferencePair, StepReport

#: A training metric ► the evaluation's; pairs/NAME is eval/NAME.
EVALUATED = {"train/loss": "eval/loss", "train/num_tokens": "eval/num_tokens"}


class Work(Protocol):
    """One kind of data at work."""

    async def step(self, step: int) -> StepReport:
        """Train step `step` (from 0)."""

    async def evaluate(self) -> dict[str, float] | None:
        """What a step would measure of the evaluation's data; None where there are none."""


class Examples:
    """Completions: next token."""

    def __init__(self, config: Config, rooms: OfflineRooms, train: SftSource, evaluation: SftSource | None) -> None:
        self._size, self._rooms, self._train, self._evaluation = (
            config.batch.prompts_per_step, rooms, train, evaluation)

    async def step(self, step: int) -> StepReport:
        return await self._rooms.sft_step(self._train.batch(step, self._size))

    async def evaluate(self) -> dict[str, float] | None:
        return await self._rooms.sft_metrics(self._evaluation.all()) if self._evaluation else None


class Pairs:
    """Preference pairs: their reference log-probs are asked once, where the objective has any."""

    def __init__(
        self, config: Config, rooms: OfflineRooms, train: PairSource, evaluation: PairSource | None,
        reference: KeptReference | None,
    ) -> None:
        self._size, self._rooms, self._train, self._evaluation = (
            config.batch.prompts_per_step, rooms, train, evaluation)
        self._reference = reference

    async def step(self, step: int) -> StepReport:
        pairs = self._train.batch(step, self._size)
        return await self._rooms.pair_step(pairs, await self._sums(pairs))

    async def evaluate(self) -> dict[str, float] | None:
        if self._evaluation is None:
            return None
        pairs = self._evaluation.all()
        return await self._rooms.pair_metrics(pairs, await self._sums(pairs))

    async def _sums(self, pairs: list[PreferencePair]) -> list[Sums] | None:
        return await self._reference.of(pairs) if self._reference else None


class Groups:
    """Groups with given rewards: the policy's own step, without a rollout before it."""

    def __init__(self, config: Config, rooms: OfflineRooms, train: GroupSource) -> None:
        self._size, self._rooms, self._train = config.batch.prompts_per_step, rooms, train

    async def step(self, step: int) -> StepReport:
        groups = self._train.batch(step, self._size)
        report = await self._rooms.group_step(groups, version=step)
        scored = [group.scored for group in groups]
        measured = reward_metrics(scored, "reward") | length_metrics(scored, "rollout")
        return StepReport(report.version, measured | report.metrics)

    async def evaluate(self) -> dict[str, float] | None:
        return None


def make_work(config: Config, *, data: OfflineData, rooms: OfflineRooms, recorder: Recorder) -> Work:
    """What goes with the data."""
    train, evaluation = data.train, data.evaluation
    if isinstance(train, GroupSource):
        return Groups(config, rooms, train)
    if isinstance(train, PairSource):
        assert evaluation is None or isinstance(evaluation, PairSource)
        reference = None
        if algo.needs_reference(config.algo):
            earlier = run_dir.run_of(config.resume) if config.resume else None
            path = str(config.reference.path or config.model.path)
            reference = KeptReference(recorder.folder, path=path, ask=rooms.pair_reference, earlier=earlier)
        return Pairs(config, rooms, train, evaluation, reference)
    assert evaluation is None or isinstance(evaluation, SftSource)
    return Examples(config, rooms, train, evaluation)


class OfflineLoop:
    """Steps, checkpoints, evaluations: at the start, every eval.every steps and at the end."""

    def __init__(
        self, config: Config, *, rooms: OfflineRooms, work: Work, recorder: Recorder, start: LoopState
    ) -> None:
        self._config, self._rooms, self._work, self._recorder = config, rooms, work, recorder
        self._start = start

    async def run(self) -> None:
        if self._start.step == 0:
            await evaluate(self._work, version=0, recorder=self._recorder)
        elif self._recorder.evaluated(self._start.step) is None:  # ended before it could be
            await self._evaluate_if_due(self._start.step)
        for step in range(self._start.step, self._config.driver.num_steps):
            start_s = time.monotonic()
            report = await self._work.step(step)
            seconds = time.monotonic() - start_s
            self._recorder.step(
                step, report.metrics | {"driver/step_s": seconds, "driver/version": float(report.version)}
            )
            await self._save_if_due(step + 1)
            await self._evaluate_if_due(step + 1)

    async def _save_if_due(self, step: int) -> None:
        every = self._config.checkpoint.every
        if every and step % every == 0:
            await saved.save_whole(
                self._recorder.folder.checkpoints,
                LoopState(step, next_uid=0),
                self._rooms,
                keep=self._config.checkpoint.keep,
            )

    async def _evaluate_if_due(self, step: int) -> None:
        every = self._config.eval.every
        if step == self._config.driver.num_steps or (every and step % every == 0):
            await evaluate(self._work, version=step, recorder=self._recorder)


async def evaluate(work: Work, *, version: int, recorder: Recorder) -> None:
    """One evaluation, written as every other; nothing where there are no data for it."""
    start_s = time.monotonic()
    measured = await work.evaluate()
    if measured is not None:
        metrics = {EVALUATED.get(name, name.replace("pairs/", "eval/", 1)): value for name, value in measured.items()}
        recorder.evaluation(version, metrics | {"eval/s": time.monotonic() - start_s}, [])
