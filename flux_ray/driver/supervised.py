"""The short loop of supervised training: examples in, a trained policy out.

Takes:  the examples, the training ranks, a place to write to.
Gives:  trained weights, a line of metrics a step, checkpoints.
Never:  needs an engine.
"""

from __future__ import annotations

import time

from flux_ray.config import Config
from flux_ray.data import SftSource
from flux_ray.driver import state as saved
from flux_ray.driver.recorder import Recorder
from flux_ray.driver.rooms import TrainingRooms
from flux_ray.driver.state import LoopState


class SupervisedLoop:
    def __init__(
        self, config: Config, *, rooms: TrainingRooms, examples: SftSource, recorder: Recorder, start: LoopState
    ) -> None:
        self._config, self._rooms, self._examples, self._recorder = config, rooms, examples, recorder
        self._start = start

    async def run(self) -> None:
        for step in range(self._start.step, self._config.driver.num_steps):
            start_s = time.monotonic()
            report = await self._rooms.supervised(self._examples.batch(step, self._config.batch.prompts_per_step))
            seconds = time.monotonic() - start_s
            self._recorder.step(
                step, report.metrics | {"driver/step_s": seconds, "driver/version": float(report.version)}
            )
            await self._save_if_due(step + 1)

    async def _save_if_due(self, step: int) -> None:
        every = self._config.checkpoint.every
        if every and step % every == 0:
            await saved.save_whole(
                self._recorder.folder.checkpoints,
                LoopState(step, next_uid=0),
                self._rooms,
                keep=self._config.checkpoint.keep,
            )
