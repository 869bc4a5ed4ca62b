"""What a rollout worker writes down of its groups: those that a step took, and those that were dropped meanwhile.

Takes:  groups as they are dropped; what ranks made of those that were trained on.
Gives:  `write`: a step's rollouts on disk, written by a thread.
Knows:  the run's folder may not be seen from this machine.
Never:  fails the run.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from flux_ray import run_dir
from flux_ray.config import PolicyGradientConfig
from flux_ray.messages import TrainedTokens, Written
from flux_ray.observability import rollouts
from flux_ray.observability.rollouts import TRAINED, Rollout
from flux_ray.records import RolloutGroup
from flux_ray.rollout.owned import Carried, Key


class RolloutFiles:
    def __init__(self, config: PolicyGradientConfig, *, worker: int) -> None:
        settings = config.observability
        self._folder = config.run_dir if settings.rollouts_max_gib else None
        self._share, self._worker = settings.rollouts_share, worker
        self._waiting: list[Rollout] = []  # to be written with the step that is under way

    def dropped(self, carried: Carried, cause: str) -> None:
        """A group without samples, or of an evaluation, leaves nothing to write."""
        if carried.group is not None and not carried.first.evaluates and self._keeps(carried.first.prompt.uid):
            self._waiting.append(self._rollout(carried, carried.group, cause))

    def trained(self, carried: dict[Key, Carried], trained: TrainedTokens) -> None:
        """What a rank made of these groups; of those that aren't here any more nothing is written."""
        for at, update, made in rollouts.unpacked(trained):
            one = carried.get((at.uid, at.attempt))
            if one is not None and one.group is not None:
                values = {name: None if values_S is None else _split(values_S, one.group)
                          for name, values_S in made.items()}
                values.setdefault("reference_logprobs", one.reference)
                self._waiting.append(self._rollout(one, one.group, TRAINED, update, values))

    async def write(self, step: int) -> Written:
        waiting, self._waiting = self._waiting, []
        if self._folder is None or not waiting:
            return Written(0)
        return await asyncio.to_thread(_written, self._folder, step, waiting)

    def forget(self) -> None:
        """The step that is under way will never be."""
        self._waiting = []

    def _keeps(self, uid: int) -> bool:
        return self._folder is not None and rollouts.is_kept(uid, self._share)

    def _rollout(
        self, carried: Carried, group: RolloutGroup, outcome: str, update: int | None = None,
        made: dict[str, list[np.ndarray] | None] | None = None,
    ) -> Rollout:
        return Rollout(group, carried.first.attempt, carried.texts, carried.scored, outcome, self._worker,
                       carried.sample_engines, carried.generate_s, carried.score_s, carried.reference_s, update, made)


def _split(values_S: np.ndarray, group: RolloutGroup) -> list[np.ndarray]:
    return np.split(values_S, np.cumsum([t.num_tokens for t in group.trajectories])[:-1])


def _written(folder: str, step: int, waiting: Iterable[Rollout]) -> Written:
    if not Path(folder, run_dir.CONFIG).is_file():
        return Written(0, f"machine {socket.gethostname()}, where a rollout worker runs, doesn't see run_dir={folder}: "
                          "its rollouts are not written (name a folder that all machines share)")
    try:
        return Written(rollouts.write(folder, step, list(waiting)))
    except OSError as error:
        return Written(0, f"rollouts of step {step} can't be written to {folder}: {error.strerror or error}")
