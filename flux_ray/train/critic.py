"""One rank of the critic's group: gives values of states, and learns them from returns.

Takes:  Config and a place in the group; whole groups, and the returns that the policy's ranks made from the values.
Gives:  (T,) values per trajectory; a StepReport per step; what every Rank gives.
Knows:  it trains as the policy does (epochs, mini-batches, ZeRO), but has its own first weights and learning rate.
Never:  estimates an advantage, or sees a reward but in a return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
from torch import Tensor

from flux_ray import algo
from flux_ray.batch import MicroBatch, Weighting, divisor, make_samples
from flux_ray.config import PPOConfig
from flux_ray.model.scoring import by_group, per_sample, scoring_samples
from flux_ray.observability.metrics import Metric, merge, read
from flux_ray.records import RolloutGroup, ScoredGroup, StepReport
from flux_ray.train.rank import Rank, trained_score
from flux_ray.train.rank_batch import Part, PerGroup, RankBatch, divided, flat, packed, split
from flux_ray.train.setup import Place

AGGREGATION = "token_mean"  # of the value loss


class Critic(Rank):
    """All methods are collective."""

    config: PPOConfig
    trained = "critic"

    def __init__(self, config: PPOConfig, **place: Unpack[Place]) -> None:
        """`config`: one in which `model` and `train` are the critic's."""
        super().__init__(config, load=trained_score, **place)

    def values(self, groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
        """Per group and trajectory, (T,) float32: at each sampled token the value of the state before it, else 0."""
        samples = scoring_samples(groups)
        micro_batches = packed(self.engine, self.config.batch, samples)
        values = self.engine.forward(micro_batches, at="before")
        return by_group(per_sample(values, micro_batches, len(samples)), groups)

    def train_step(
        self, *, groups: Sequence[RolloutGroup], scores: Sequence[ScoredGroup], values: PerGroup, returns: PerGroup,
        step: int,
    ) -> StepReport:
        """One step on all ranks' groups: as many updates as the policy's, towards the returns.

        `values`: as `values` gave them before the step.
        """
        config = self.config
        wanted = [row for group in returns for row in group]
        old = [row for group in values for row in group]
        batch = RankBatch(groups, scores, step, (step,))
        parts = split(self.engine, config, batch)
        updates = [self._mini_batch(part, old[part.samples], wanted[part.samples]) for part in parts]
        total_updates = config.driver.num_steps * config.algo.epochs * config.algo.mini_batches
        measured = []
        for _ in range(config.algo.epochs):
            for part, mini_batch in zip(parts, updates, strict=True):
                by = divisor(AGGREGATION, part.counts)
                metrics = self.engine.update(mini_batch.micro_batches, mini_batch, total_updates=total_updates,
                                             divisor=by, at="before")
                measured.append(divided(metrics, "critic/loss", by))
        self.step = step + 1
        self.keep_skipped(self.step, scores)
        merged = self.engine.merge(merge(measured))
        return StepReport(self.step, {_named(name): value for name, value in read(merged).items()})

    def _mini_batch(self, part: Part, old: list[np.ndarray], wanted: list[np.ndarray]) -> ValueObjective:
        config, batch = self.config, part.batch
        samples = make_samples(
            batch.groups, batch.scores, advantages=None, reference_logprobs=None,
            weighting=Weighting(AGGREGATION, config.rollout.max_tokens),
            mask_truncated=algo.masks_truncated(config), versions=batch.versions,
        )
        micro_batches = packed(self.engine, config.batch, samples)
        return ValueObjective(micro_batches, [flat(old, m) for m in micro_batches],
                              [flat(wanted, m) for m in micro_batches], config.critic.clip_range)


@dataclass(frozen=True)
class ValueObjective:
    """The clipped value loss on micro-batches, with the old values and the returns (S,) of each."""

    micro_batches: list[MicroBatch]
    old_values: list[Tensor]
    returns: list[Tensor]
    clip_range: float

    def __call__(self, i: int, micro_batch: MicroBatch, values_S: Tensor) -> tuple[Tensor, dict[str, Metric]]:
        return algo.value_objective(
            values_S, old_values=self.old_values[i].to(values_S.device), returns=self.returns[i].to(values_S.device),
            mask=micro_batch.loss_mask_S, loss_weights=micro_batch.loss_weights_S, clip_range=self.clip_range,
        )


def _named(metric: str) -> str:
    """An engine's metric by the critic's name: train/grad_norm ► critic/grad_norm."""
    return metric.replace("train/", "critic/", 1)
