"""A policy-gradient step: from scored groups to optimizer updates.

Takes:  this rank's whole groups, their scores and reference log-probs, a critic's values.
Gives:  `run`: metrics of this rank, after epochs x mini_batches updates, and its tokens' values; `accumulate`: the
        gradients of some of the groups, before the rest has come.
Knows:  the order: old log-probs ► advantages ► counts of all ranks ► micro-batches ► updates.
Never:  splits a group, or lets a rank without groups fall out of step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flux_ray import algo
from flux_ray.algo import Algorithm
from flux_ray.algo.advantages import Everyone
from flux_ray.algo.estimators import Reduce
from flux_ray.batch import (
    MicroBatch,
    StepCounts,
    Weighting,
    divisor,
    estimated,
    make_samples,
    padded_mask,
    response_views,
    to_padded,
)
from flux_ray.config import BatchConfig, PolicyConfig, PolicyGradientConfig, PPOConfig
from flux_ray.model.routing import Routing
from flux_ray.model.scoring import per_sample, scoring_samples
from flux_ray.observability.metrics import Metric, merge
from flux_ray.records import Sample
from flux_ray.train.engine import Asked, Engine
from flux_ray.train.rank_batch import Part, RankBatch, divided, flat, packed, split


@dataclass(frozen=True)
class Begun:
    """What a step has accumulated: all ranks' counts, and this rank's metrics, whose loss isn't divided yet."""

    counts: StepCounts
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class TokenValues:
    """What a step made of a batch's tokens: (T,) float32 of each sample."""

    advantages: list[np.ndarray]
    returns: list[np.ndarray]
    old: list[np.ndarray] | None
    policy: list[np.ndarray] | None  # log-probs of the policy that the sample's first update began with
    entropies: list[np.ndarray] | None  # of that policy too
    updates: list[int | None]  # of each group, which of a pass's updates took it


def accumulate(
    engine: Engine, config: PolicyConfig, batch: RankBatch, begun: Begun | None, *, keeps: bool = False,
) -> tuple[Begun, TokenValues]:
    """Forward and backward of some of the step's groups; `run` takes the rest. Collective.

    Not for algorithms that need the whole batch. `keeps`: the policy's log-probs and entropies are given too.
    """
    algorithm = algo.resolve(config.algo)
    assert not algorithm.needs_whole_batch and not algorithm.needs_critic, algorithm.name
    prepared = _prepared(engine, config, algorithm, batch)
    (part,) = split(engine, config, prepared.batch)
    mini_batch = _mini_batch(engine, config, algorithm, prepared, part)
    seen: Seen | None = {} if keeps else None
    objective = PolicyObjective(config, algorithm, mini_batch, True, seen, engine.model.routing)
    measured = engine.accumulate(mini_batch.micro_batches, objective, **_asked(config))
    before = begun or Begun(StepCounts(0, 0), {})
    begun = Begun(before.counts + part.counts, merge([before.metrics, prepared.metrics, measured]))
    return begun, _token_values(prepared, [part], [mini_batch], [seen])


def run(
    engine: Engine, config: PolicyConfig, batch: RankBatch, begun: Begun | None = None, *, keeps: bool = False,
) -> tuple[dict[str, Metric], TokenValues]:
    """All updates of one step; none in the steps in which a critic learns alone. Collective.

    Gives the metrics, and the tokens' values. `keeps`: the policy's log-probs and entropies are
    among them.
    """
    algorithm = algo.resolve(config.algo)
    prepared = _prepared(engine, config, algorithm, batch)
    steps_alone = config.critic.warmup_steps if isinstance(config, PPOConfig) else 0
    if batch.step < steps_alone:
        return prepared.metrics, _token_values(prepared, [], [], [])
    total_updates = (config.driver.num_steps - steps_alone) * config.algo.epochs * config.algo.mini_batches
    parts = split(engine, config, prepared.batch)
    mini_batches = [_mini_batch(engine, config, algorithm, prepared, part) for part in parts]
    before = begun or Begun(StepCounts(0, 0), {})
    measured = [prepared.metrics]
    seen: list[Seen | None] = [{} if keeps else None for _ in parts]
    for epoch in range(config.algo.epochs):
        for k, (part, mini_batch) in enumerate(zip(parts, mini_batches, strict=True)):
            # The gap to the sampler is measured with the policy as it was before the batch's first update.
            fresh = epoch == 0 and (k == 0 or prepared.old is not None)
            routing = None if epoch or k else engine.model.routing
            objective = PolicyObjective(config, algorithm, mini_batch, fresh, None if epoch else seen[k], routing)
            by = divisor(algorithm.aggregation, before.counts + part.counts)
            metrics = engine.update(mini_batch.micro_batches, objective, total_updates=total_updates, divisor=by,
                                    **_asked(config))
            made = "train/grad_norm" in metrics  # else nothing of the update counts, nor of what was accumulated
            measured.append(divided(merge([before.metrics if made else {}, metrics]), "actor/loss", by))
    return merge(measured), _token_values(prepared, parts, mini_batches, seen)


def _asked(config: PolicyConfig) -> Asked:
    return {"temperature": config.rollout.temperature, "with_entropy": True}


@dataclass(frozen=True)
class PreparedBatch:
    """Groups with what an update needs beside their tokens: for each sample (T,) values."""

    batch: RankBatch
    old: list[np.ndarray] | None
    advantages: list[np.ndarray]
    returns: list[np.ndarray]
    metrics: dict[str, Metric]


def _prepared(engine: Engine, config: PolicyConfig, algorithm: Algorithm, batch: RankBatch) -> PreparedBatch:
    if isinstance(config, PolicyGradientConfig):
        batch = replace(batch, scores=[estimated(score, config.reward) for score in batch.scores])
    old = _old_logprobs(engine, config, batch) if algo.needs_old_logprobs(config.algo) else None
    (advantages, returns), kl_paid = estimate(config, algorithm, batch, old, reduce=engine.sum,
                                              everyone=engine.everyone)
    return PreparedBatch(batch, old, advantages, returns, kl_paid)


@dataclass(frozen=True)
class MiniBatch:
    """What one update is made from: micro-batches and, beside each, π_old's log-probs (S,) where they are needed."""

    micro_batches: list[MicroBatch]
    old_logprobs: list[Tensor] | None


Seen = dict[int, tuple[Tensor, Tensor]]  # micro-batch by its place ► the policy's log-probs and entropies (S,)


def _token_values(
    prepared: PreparedBatch, parts: Sequence[Part], mini_batches: Sequence[MiniBatch], seen: Sequence[Seen | None],
) -> TokenValues:
    """Without parts: no update was made."""
    updates: list[int | None] = [k for k, part in enumerate(parts) for _ in part.batch.groups]

    def of_samples(which: int) -> list[np.ndarray] | None:
        rows = []
        for part, mini_batch, of_part in zip(parts, mini_batches, seen, strict=True):
            if of_part is None:
                return None
            # A micro-batch without a token to learn from was never shown to the objective.
            values = [of_part[i][which] if i in of_part else torch.zeros(m.num_tokens)
                      for i, m in enumerate(mini_batch.micro_batches)]
            rows += per_sample(values, mini_batch.micro_batches, part.samples.stop - part.samples.start)
        return rows if parts else None

    return TokenValues(prepared.advantages, prepared.returns, prepared.old, of_samples(0), of_samples(1),
                       updates or [None] * len(prepared.batch.groups))


@dataclass(frozen=True)
class PolicyObjective:
    """The algorithm's loss on one micro-batch, in the padded views that estimators and losses are written for."""

    config: PolicyConfig
    algorithm: Algorithm
    mini_batch: MiniBatch
    measure_gap: bool
    seen: Seen | None = None  # where the log-probs are to be kept
    routing: Routing | None = None  # of the model, where its choices of experts are compared with the engine's

    def __call__(
        self, i: int, micro_batch: MicroBatch, logprobs_S: Tensor, entropy_S: Tensor | None,
    ) -> tuple[Tensor, dict[str, Metric]]:
        if self.seen is not None and entropy_S is not None:
            self.seen[i] = logprobs_S.detach(), entropy_S.detach()
        old_S = None
        if self.mini_batch.old_logprobs is not None:
            old_S = self.mini_batch.old_logprobs[i].to(logprobs_S.device)
        if entropy_S is not None and not self.config.algo.entropy_coef:
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
            metrics |= self.routing.agreement(current_S) if self.routing is not None else {}
        return loss, metrics


def logprobs(
    engine: Engine, config: BatchConfig, samples: Sequence[Sample], *, temperature: float,
) -> list[np.ndarray]:
    """The policy's log-probs of each sample, (T,), 0 off the mask. Collective."""
    micro_batches = packed(engine, config, samples)
    values = engine.forward(micro_batches, temperature=temperature, with_entropy=False)
    return per_sample(values, micro_batches, len(samples))


def _old_logprobs(engine: Engine, config: PolicyConfig, batch: RankBatch) -> list[np.ndarray]:
    samples = scoring_samples(batch.groups, with_experts=True)
    return logprobs(engine, config.batch, samples, temperature=config.rollout.temperature)


def estimate(
    config: PolicyConfig, algorithm: Algorithm, batch: RankBatch, old: list[np.ndarray] | None, *, reduce: Reduce,
    everyone: Everyone | None,
) -> tuple[tuple[list[np.ndarray], list[np.ndarray]], dict[str, Metric]]:
    """(T,) advantages and returns of each sample of this rank's groups, and metrics of a KL in their rewards.

    Statistics over the batch come from all ranks.
    """
    views = response_views(batch.groups, batch.scores, mask_truncated=algo.masks_truncated(config))
    reference = None
    if batch.reference_logprobs is not None:
        reference = views.from_samples([row for group in batch.reference_logprobs for row in group])
    old_NL = None if old is None else views.from_samples(old)
    values_NL = None
    if batch.values is not None:
        values_NL = views.from_samples([row for group in batch.values for row in group])
    advantages_NL, returns_NL = algo.compute_advantages(
        algorithm, token_level_rewards=views.token_level_rewards_NL, response_mask=views.response_mask_NL,
        index=views.index_N, config=algo.estimator_config(config), group_size=config.rollout.group_size,
        old_logprobs=old_NL, reference_logprobs=reference, values=values_NL, sampled_mask=views.sampled_mask_NL,
        reduce=reduce, everyone=everyone,
    )
    measured = {}
    if config.algo.kl_coef:
        assert old_NL is not None and reference is not None, "a KL in the reward needs both log-probs"
        measured = algo.reward_kl(old_NL, reference, response_mask=views.response_mask_NL, coef=config.algo.kl_coef)
    return (views.to_samples(advantages_NL), views.to_samples(returns_NL)), measured


def _mini_batch(
    engine: Engine, config: PolicyConfig, algorithm: Algorithm, prepared: PreparedBatch, part: Part,
) -> MiniBatch:
    samples = samples_of(config, algorithm, part.batch, prepared.advantages[part.samples])
    micro_batches = packed(engine, config.batch, samples)
    olds = None if prepared.old is None else [flat(prepared.old[part.samples], m) for m in micro_batches]
    return MiniBatch(micro_batches, olds)


def samples_of(
    config: PolicyConfig, algorithm: Algorithm, batch: RankBatch, advantages: Sequence[np.ndarray],
) -> list[Sample]:
    """The batch's samples, with their weights in the loss; `advantages`: (T,) of each."""
    return make_samples(
        batch.groups, batch.scores, advantages=advantages, reference_logprobs=batch.reference_logprobs,
        weighting=Weighting(algorithm.aggregation, config.rollout.max_tokens),
        mask_truncated=algo.masks_truncated(config), versions=batch.versions)
