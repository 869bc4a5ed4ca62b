"""Checkpoints and models of a run, as its groups of actors write them.

Takes:  the loop's state, the groups that train, what an evaluation gave.
Gives:  `Saver`, which writes beside the next step; `save_models`.
Knows:  parts first, driver.json, the manifest, and the folder's name at the end: until then nothing counts.
Never:  ends a run because a checkpoint can't be written; has two under way at once.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from flux_ray.cluster.group import Group, all_within
from flux_ray.cluster.plan import ROLLOUT
from flux_ray.config import Config
from flux_ray.errors import unknown
from flux_ray.model.save import UNWRITTEN, sync, why_unwritten
from flux_ray.protocols import Trains
from flux_ray.records import LoopState
from flux_ray.run import manifest
from flux_ray.run.checkpoint import (
    Best,
    Due,
    best,
    checkpoint_folder,
    mark_best,
    prune,
    save,
)


class Saver:
    """The checkpoints of one run. `save` gives back the ranks as soon as they may go on."""

    def __init__(self, config: Config, checkpoints: Callable[[], Path], trained: Sequence[Group[Trains]], *,
                 keep: Callable[[LoopState, Path], Awaitable[LoopState]], warn: Callable[[str], None]) -> None:
        """`checkpoints`: the folder of them all; `keep` writes finished groups into a new folder, and gives the state
        that tells of them; `warn` tells of a checkpoint that isn't kept."""
        self._config, self._options, self._trained = config, config.checkpoint, trained
        self._checkpoints, self._keep, self._warn = checkpoints, keep, warn
        self._due = Due(config, time.monotonic())
        self._step = -1                                  # of the last that was begun
        self._writing: asyncio.Task[None] | None = None  # what comes after the ranks: it ends when all is on disk
        self._tasks: asyncio.TaskGroup | None = None
        self._best: Best | None = None                   # which is marked as soon as it is on disk

    def begin(self, tasks: asyncio.TaskGroup) -> None:
        """What writes beside the training is among these tasks: the group's end waits for it."""
        self._tasks = tasks

    @property
    def step(self) -> int:
        """Of the last checkpoint that was begun; -1: there is none."""
        return self._step

    def is_due(self, step: int) -> bool:
        return self._due.is_due(step, time.monotonic())

    async def save(self, state: LoopState) -> None:
        """A checkpoint of each group that is trained, by its role, and of the loop; older ones beyond keep go.

        Waits for the one before.
        """
        await self.finish()
        self._step = state.step
        self._due.saved(time.monotonic())
        final = checkpoint_folder(self._checkpoints(), state.step)
        folder = final.with_name(f".{final.name}.writing")
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        except OSError as error:
            self._not_kept(state.step, why_unwritten(error))
            return
        state = await self._keep(state, folder / ROLLOUT)
        await all_within([rank.call(Trains.save_checkpoint, str(folder / group.role), self._options.background)
                          for group in self._trained for rank in group], self._config.train.deadline_s)
        self._beside(self._commit(state, folder, final))

    async def finish(self) -> None:
        """Waits until nothing is being written."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    async def evaluated(self, state: LoopState, metrics: dict[str, float]) -> None:
        """What the evaluation after this step gave: the checkpoint of the best one is kept, and made where there is
        none. UserError for a metric that evaluations don't have."""
        metric = self._options.best
        if metric is None:
            return
        name = metric.removeprefix("-")
        if name not in metrics:
            raise unknown("metric in checkpoint.best", name, sorted(metrics))
        if state.step == 0 or not math.isfinite(metrics[name]):   # before the first step there is nothing to keep
            return
        found, before = Best(metric, state.step, metrics[name]), self._best or best(self._checkpoints())
        if before is None or before.metric != metric or found.score > before.score:
            if self._step != state.step:
                await self.save(state)
            self._best = found
            self._beside(self._mark(self._writing, found))

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None, "begin comes first"
        self._writing = self._tasks.create_task(work)

    async def _commit(self, state: LoopState, folder: Path, final: Path) -> None:
        found = await all_within([rank.call(Trains.finish_checkpoint) for group in self._trained for rank in group],
                                 self._config.train.deadline_s)
        why = next(filter(None, found), None) or await asyncio.to_thread(_commit, state, folder, final)
        if why is not None:
            self._not_kept(state.step, why)
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            return
        await asyncio.to_thread(prune, self._checkpoints(), self._options.keep)

    async def _mark(self, writing: asyncio.Task[None] | None, marked: Best) -> None:
        """Once its checkpoint is there; then another one, which was the best, may go."""
        if writing is not None:
            await asyncio.wait({writing})
        checkpoints = self._checkpoints()
        try:
            if checkpoint_folder(checkpoints, marked.step).is_dir():
                await asyncio.to_thread(mark_best, checkpoints, marked)
                await asyncio.to_thread(prune, checkpoints, self._options.keep)
                return
        except OSError as error:
            self._warn(f"checkpoint.best: step {marked.step} can't be marked: {why_unwritten(error)}")
        self._best = None   # what is marked on disk is still the best

    def _not_kept(self, step: int, why: str) -> None:
        self._warn(f"the checkpoint of step {step} can't be kept: {why}; the run goes on, and those before it stay")


def _commit(state: LoopState, folder: Path, final: Path) -> str | None:
    """The parts are on disk: all that makes them a checkpoint. Why they are none, where they aren't."""
    try:
        save(folder, state)
        manifest.write(folder)
        problem = manifest.unusable(folder)
        if problem is not None:
            return problem
        shutil.rmtree(final, ignore_errors=True)   # of a run before this one
        os.rename(folder, final)
        sync(final.parent)
    except UNWRITTEN as error:
        return why_unwritten(error)
    return None


async def save_models(folder: Path, trained: Sequence[Group[Trains]], *, deadline_s: float) -> None:
    """What the first group trains in `folder`; any other's beside it, by its role."""
    folders = [folder, *(folder.with_name(group.role) for group in trained[1:])]
    await all_within([rank.call(Trains.save_model, str(into)) for into, group in zip(folders, trained, strict=True)
                      for rank in group], deadline_s)
