"""A policy-gradient step: from scored groups to optimizer updates.

Takes:  this rank's whole groups, their scores and reference log-probs, the trainer's version.
Gives:  the step's metrics of this rank, after epochs x mini_batches updates.
Knows:  the order: counts of all ranks ► old log-probs ► advantages ► weights ► micro-batches ► updates.
Never:  splits a group, or lets a rank without groups fall out of step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flux_ray import algo
from flux_ray.algo import Algorithm
from flux_ray.batch import (
    MicroBatch,
    StepCounts,
    Weighting,
    estimated,
    make_samples,
    pack,
    padded_mask,
    response_views,
    step_counts,
    to_padded,
)
from flux_ray.config import Config
from flux_ray.model.scoring import per_sample, scoring_samples
from flux_ray.observability.metrics import Metric, merge
from flux_ray.records import RolloutGroup, Sample, ScoredGroup
from flux_ray.train.engine import Engine


@dataclass(frozen=True)
class RankBatch:
    """This rank's share of a step's batch: whole groups; `reference_logprobs` per group and trajectory, (T,)."""

    groups: Sequence[RolloutGroup]
    scores: Sequence[ScoredGroup]
    reference_logprobs: Sequence[Sequence[np.ndarray]] | None
    version: int

    def part(self, start: int, stop: int) -> RankBatch:
        reference = None if self.reference_logprobs is None else self.reference_logprobs[start:stop]
        return RankBatch(self.groups[start:stop], self.scores[start:stop], reference, self.version)


def run(engine: Engine, config: Config, batch: RankBatch) -> dict[str, Metric]:
    """All updates of one step. Collective."""
    algorithm = algo.resolve(config.algo)
    batch = replace(batch, scores=[estimated(score, config.reward) for score in batch.scores])
    old = _old_logprobs(engine, config, batch) if algo.needs_old_logprobs(config.algo) else None
    advantages, kl_paid = _advantages(engine, config, algorithm, batch, old)
    mini_batches = _mini_batches(engine, config, algorithm, batch, advantages, old)
    total_updates = config.driver.num_steps * config.algo.epochs * config.algo.mini_batches
    measured = [kl_paid]
    for epoch in range(config.algo.epochs):
        for k, mini_batch in enumerate(mini_batches):
            # The gap to the sampler is that of the policy before the batch's first update.
            fresh = epoch == 0 and (k == 0 or old is not None)
            objective = PolicyObjective(config, algorithm, mini_batch, fresh)
            measured.append(engine.update(
                mini_batch.micro_batches, objective, temperature=config.rollout.temperature, with_entropy=True,
                total_updates=total_updates,
            ))
    return merge(measured)


@dataclass(frozen=True)
class MiniBatch:
    """What one update is made from: micro-batches and, beside each, π_old's log-probs (S,) where they are needed."""

    micro_batches: list[MicroBatch]
    old_logprobs: list[Tensor] | None


@dataclass(frozen=True)
class PolicyObjective:
    """The algorithm's loss on one micro-batch, in the padded views that estimators and losses are written for."""

    config: Config
    algorithm: Algorithm
    mini_batch: MiniBatch
    measure_gap: bool

    def __call__(
        self, i: int, micro_batch: MicroBatch, logprobs_S: Tensor, entropy_S: Tensor,
    ) -> tuple[Tensor, dict[str, Metric]]:
        old_S = None
        if self.mini_batch.old_logprobs is not None:
            old_S = self.mini_batch.old_logprobs[i].to(logprobs_S.device)
        if not self.config.algo.entropy_coef:
            entropy_S = entropy_S.detach()  # measured only: backward then skips it

        def view(values_S: Tensor | None) -> Tensor | None:
            return None if values_S is None else to_padded(values_S, micro_batch)

        assert micro_batch.advantages_S is not None
        loss, metrics = algo.policy_objective(
            self.algorithm, self.config.algo, log_prob=to_padded(logprobs_S, micro_batch), old_log_prob=view(old_S),
            sampler_log_prob=view(micro_batch.sampler_logprobs_S),
            reference_log_prob=view(micro_batch.reference_logprobs_S), entropy=view(entropy_S),
            advantages=to_padded(micro_batch.advantages_S, micro_batch), response_mask=padded_mask(micro_batch),
            loss_weights=to_padded(micro_batch.loss_weights_S, micro_batch),
        )
        if self.measure_gap and micro_batch.sampler_logprobs_S is not None:
            lengths_B = micro_batch.lengths_B.to(logprobs_S.device)
            current_S = micro_batch.current_version_B.repeat_interleave(lengths_B) & micro_batch.loss_mask_S
            before_S = logprobs_S if old_S is None else old_S
            metrics |= algo.logprob_gap(before_S, micro_batch.sampler_logprobs_S, current_S)
        return loss, metrics


def packed(engine: Engine, config: Config, samples: Sequence[Sample]) -> list[MicroBatch]:
    """Micro-batches of the configured budget, for the policy's layout."""
    return pack(samples, max_tokens=config.batch.max_tokens_per_micro_batch, max_samples=config.batch.micro_batch_size,
                padded=engine.model.layout == "padded")


def logprobs(
    engine: Engine, config: Config, samples: Sequence[Sample], *, temperature: float,
) -> list[np.ndarray]:
    """The policy's log-probs of each sample, (T,), 0 off the mask. Collective."""
    micro_batches = packed(engine, config, samples)
    values = engine.forward(micro_batches, temperature=temperature, with_entropy=False)
    return per_sample(values, micro_batches, len(samples))


def _old_logprobs(engine: Engine, config: Config, batch: RankBatch) -> list[np.ndarray]:
    return logprobs(engine, config, scoring_samples(batch.groups), temperature=config.rollout.temperature)


def _advantages(
    engine: Engine, config: Config, algorithm: Algorithm, batch: RankBatch, old: list[np.ndarray] | None,
) -> tuple[list[np.ndarray], dict[str, Metric]]:
    """Per-sample (T,) advantages of this rank's groups, and what is measured of a KL in their rewards.

    Statistics over the batch come from all ranks.
    """
    views = response_views(batch.groups, batch.scores, mask_truncated=algo.masks_truncated(config))
    reference = None
    if batch.reference_logprobs is not None:
        reference = views.from_samples([row for group in batch.reference_logprobs for row in group])
    old_NL = None if old is None else views.from_samples(old)
    advantages_NL, _ = algo.compute_advantages(
        algorithm, token_level_rewards=views.token_level_rewards_NL, response_mask=views.response_mask_NL,
        index=views.index_N, config=algo.estimator_config(config), group_size=config.rollout.group_size,
        old_logprobs=old_NL, reference_logprobs=reference, reduce=engine.sum,
    )
    measured = {}
    if config.algo.kl_coef:
        assert old_NL is not None and reference is not None, "a KL in the reward needs both log-probs"
        measured = algo.reward_kl(old_NL, reference, response_mask=views.response_mask_NL, coef=config.algo.kl_coef)
    return views.to_samples(advantages_NL), measured


def _mini_batches(
    engine: Engine, config: Config, algorithm: Algorithm, batch: RankBatch, advantages: list[np.ndarray],
    old: list[np.ndarray] | None,
) -> list[MiniBatch]:
    """Consecutive groups of this rank, one part for each update of an epoch; each is weighed by its own counts."""
    bounds = np.linspace(0, len(batch.groups), config.algo.mini_batches + 1).astype(int)
    first_sample = np.cumsum([0, *(len(g.trajectories) for g in batch.groups)])
    parts = [batch.part(a, b) for a, b in itertools.pairwise(bounds)]
    counts = _counts_of_all_ranks(engine, config, parts)
    result = []
    for part, count, (a, b) in zip(parts, counts, itertools.pairwise(first_sample[bounds]), strict=True):
        samples = make_samples(
            part.groups, part.scores, advantages=advantages[a:b], reference_logprobs=part.reference_logprobs,
            weighting=Weighting(algorithm.aggregation, count, config.rollout.max_tokens),
            mask_truncated=algo.masks_truncated(config), version=part.version,
        )
        micro_batches = packed(engine, config, samples)
        flat = None if old is None else [_flat(old[a:b], m) for m in micro_batches]
        result.append(MiniBatch(micro_batches, flat))
    return result


def _counts_of_all_ranks(engine: Engine, config: Config, parts: Sequence[RankBatch]) -> list[StepCounts]:
    mine = [step_counts(part.scores, mask_truncated=algo.masks_truncated(config)) for part in parts]
    everyone = engine.sum(torch.tensor([[c.num_sequences, c.num_tokens] for c in mine], dtype=torch.int64))
    return [StepCounts(num_sequences=int(n), num_tokens=int(t)) for n, t in everyone.tolist()]


def _flat(per_sample_values: Sequence[np.ndarray], micro_batch: MicroBatch) -> Tensor:
    """The (S,) axis of a micro-batch from per-sample arrays."""
    return torch.from_numpy(np.concatenate([per_sample_values[i] for i in micro_batch.sample_ids_B.tolist()]))
