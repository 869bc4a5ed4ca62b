"""A step's advantages and loss from rollouts that are on disk, by the formulas of training.

Takes:  a config; groups with the log-probs that the run wrote down of them.
Gives:  `metrics_of`; `batch_of`, `scores_of`.
Never:  has a formula of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from flux_ray import algo
from flux_ray.algo.estimators import on_one_rank
from flux_ray.batch import divisor, estimated, pack, step_counts
from flux_ray.config import PolicyGradientConfig, changed
from flux_ray.errors import UserError
from flux_ray.observability.metrics import Metric, merge, read
from flux_ray.observability.rollouts import Rollout
from flux_ray.records import Sample, ScoredGroup
from flux_ray.train.policy_step import MiniBatch, PolicyObjective, estimate, samples_of
from flux_ray.train.rank_batch import RankBatch, divided, flat


def batch_of(config: PolicyGradientConfig, trained: Sequence[Rollout], step: int) -> RankBatch:
    """The step's groups as a rank has them. UserError where a reference is asked for that the run didn't ask."""
    reference = _by_group(trained, "reference_logprobs")
    if algo.needs_reference(config.algo) and reference is None:
        raise UserError(f"algo.beta={config.algo.beta:g}, algo.kl_coef={config.algo.kl_coef:g}: the run kept no "
                        "log-probs of a reference; set both to 0")
    return RankBatch([one.group for one in trained], [scores_of(one) for one in trained], step, (step,), reference)


def scores_of(rollout: Rollout) -> ScoredGroup:
    assert rollout.scored is not None, rollout.group.prompt.uid
    return rollout.scored


def metrics_of(
    config: PolicyGradientConfig, trained: Sequence[Rollout], step: int, notes: list[str],
) -> dict[str, float]:
    """The metrics of the step's first pass, update by update as the run made them; `notes` gets what they lack."""
    algorithm, batch = algo.resolve(config.algo), batch_of(config, trained, step)
    batch = replace(batch, scores=[estimated(scored, config.reward) for scored in batch.scores])
    policy = _values(trained, "policy_logprobs")
    assert policy is not None, step
    old = _values(trained, "old_logprobs")  # without them the step had one update, whose policy is its own past
    made, metrics = _advantages(config, algorithm, batch, old or policy, trained, notes)
    samples = samples_of(config, algorithm, batch, made)
    entropies = _values(trained, "entropies")
    if entropies is None and config.algo.entropy_coef:
        notes.append("the run kept no entropies: the loss is without algo.entropy_coef's term")
        config = changed(config, {"algo.entropy_coef": 0.0})
    each = [one.update for one in trained for _ in one.group.trajectories]
    measured: list[Mapping[str, Metric]] = [metrics]
    for update in sorted({update for update in each if update is not None}):
        rows = [i for i, of in enumerate(each) if of == update]
        objective = _Objective(config, algorithm, policy, old, entropies)
        counts = step_counts([score for one, score in zip(trained, batch.scores, strict=True) if one.update == update],
                             mask_truncated=algo.masks_truncated(config))
        by = divisor(algorithm.aggregation, counts)
        measured.append(divided(objective.measured(samples, rows), "actor/loss", by))
    return read(merge(measured))


@dataclass(frozen=True)
class _Objective:
    """The training's own objective, on log-probs that are known: (T,) of each of the step's samples."""

    config: PolicyGradientConfig
    algorithm: algo.Algorithm
    policy: list[np.ndarray]
    old: list[np.ndarray] | None
    entropies: list[np.ndarray] | None

    def measured(self, samples: Sequence[Sample], rows: Sequence[int]) -> dict[str, Metric]:
        """The metrics of an update on some of the samples. Its loss isn't divided yet."""
        micro_batches = pack([samples[i] for i in rows], max_tokens=self.config.batch.max_tokens_per_micro_batch,
                             padded=True)

        def views(values: list[np.ndarray] | None) -> list[Tensor] | None:
            return None if values is None else [flat([values[i] for i in rows], m) for m in micro_batches]

        objective = PolicyObjective(self.config, self.algorithm, MiniBatch(micro_batches, views(self.old)), False)
        policy, entropies = views(self.policy), views(self.entropies)
        assert policy is not None
        return merge([objective(i, m, policy[i], None if entropies is None else entropies[i])[1]
                      for i, m in enumerate(micro_batches) if bool(m.loss_mask_S.any())])


def _advantages(
    config: PolicyGradientConfig, algorithm: algo.Algorithm, batch: RankBatch, old: list[np.ndarray] | None,
    trained: Sequence[Rollout], notes: list[str],
) -> tuple[list[np.ndarray], dict[str, Metric]]:
    """(T,) of each sample. Where they need a critic's values, which aren't kept, those of the run."""
    if not algorithm.needs_critic:
        (advantages, _), measured = estimate(config, algorithm, batch, old, reduce=on_one_rank, everyone=None)
        return advantages, measured
    notes.append("a critic's values aren't kept: the advantages are those of the run")
    return _values(trained, "advantages") or [], {}


def _values(trained: Sequence[Rollout], name: str) -> list[np.ndarray] | None:
    by_group = _by_group(trained, name)
    return None if by_group is None else [row for group in by_group for row in group]


def _by_group(trained: Sequence[Rollout], name: str) -> list[list[np.ndarray]] | None:
    of_groups = [(one.made or {}).get(name) for one in trained]
    given = [group for group in of_groups if group is not None]
    return given if given and len(given) == len(of_groups) else None
