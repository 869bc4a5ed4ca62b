"""What runs inside each kind of actor: rooms put together.

Takes:  the arguments that `build` sends.
Gives:  TrainingRank (a trainer that can publish its weights), CriticRank, ReferencePolicy; engines, reward workers and
        reward models are rooms as they are.
Knows:  that no room knows another: here, above them, they meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flux_ray.batch import pair_samples
from flux_ray.config import Config
from flux_ray.model.scoring import response_sums, scoring_samples
from flux_ray.records import PreferencePair, RolloutGroup
from flux_ray.reference import Reference
from flux_ray.train import Critic, Trainer
from flux_ray.weights.publish import CallEngines, Publisher

MIB = 2**20


def staged(config: Config) -> bool | None:
    """Whether a gloo update comes in beside running requests; None: where that costs no memory."""
    if config.weights.staging == "auto" and config.driver.max_staleness:
        return None
    return config.weights.staging == "host"


class TrainingRank(Trainer):
    """A rank of the training group with its end of the wire to the engines."""

    def __init__(self, config: Config, *, rank: int, weights_backend: str, **group: Any) -> None:
        super().__init__(config, rank=rank, **group)
        self._publisher = Publisher(
            self,
            rank=rank,
            backend=weights_backend,
            deadline_s=config.weights.deadline_s,
            bucket_bytes=config.weights.bucket_mib * MIB,
            staged=staged(config),
        )

    def prepare_wire(self) -> None:
        self._publisher.prepare()

    def connect(self, call: CallEngines, **wire: Any) -> None:
        self._publisher.connect(call, **wire)

    def publish(self, version: int) -> list[str]:
        return self._publisher.publish(version)

    def logprob_gap(self, groups: Sequence[RolloutGroup]) -> tuple[float, float]:
        """|trainer's - sampler's log-probs| over sampled tokens, mean and largest. All ranks get all groups."""
        gaps = [
            np.abs(logprobs_T - trajectory.sampler_logprobs)[trajectory.loss_mask]
            for group, of_group in zip(groups, self.logprobs(groups), strict=True)
            for trajectory, logprobs_T in zip(group.trajectories, of_group, strict=True)
        ]
        gaps_S = np.concatenate(gaps)
        return float(gaps_S.mean()), float(gaps_S.max())


class CriticRank(Critic):
    """A rank of the critic; what the driver waits for is not what the trainer gets."""

    def values_and_done(self, groups: Sequence[RolloutGroup]) -> tuple[list[list[np.ndarray]], bool]:
        """The values, which stay here to be fetched, and a word for the driver that they are there."""
        return self.values(groups), True


class ReferencePolicy(Reference):
    """The frozen policy; what the driver waits for is not what the trainer gets."""

    async def logprobs_and_done(self, group: RolloutGroup) -> tuple[list[np.ndarray], bool]:
        """The log-probs of each trajectory, which stay here to be fetched, and a word for the driver that they are
        there."""
        return await self.logprobs(scoring_samples([group])), True

    async def pair_reference(self, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
        """(chosen, rejected): log-probs of both responses of each pair, sums over their tokens."""
        sums = response_sums(await self.logprobs(pair_samples(pairs)))
        return list(zip(sums[::2], sums[1::2], strict=True))
