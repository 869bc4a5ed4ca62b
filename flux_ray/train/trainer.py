"""One data-parallel rank of the training group.

Takes:  Config and a place in the group; whole groups with scores and reference log-probs, supervised samples, pairs.
Gives:  a StepReport per step; log-probs; what every Rank gives.
Knows:  what belongs to a step; the modules beside it know how it is done.
Never:  knows of actors, engines or the driver: it runs in process, alone or beside other ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np

from flux_ray.algo import adapted_coef, reference_is_base
from flux_ray.batch import pair_samples
from flux_ray.config import Config, LossConfig, PolicyConfig, PolicyGradientConfig, changed
from flux_ray.model.scoring import by_group, response_sums, scoring_samples
from flux_ray.observability.metrics import Mean, Metric, read
from flux_ray.records import PreferencePair, RolloutGroup, Sample, ScoredGroup, StepReport
from flux_ray.train import pair_step, policy_step, sft_step
from flux_ray.train.rank import Rank, trained_policy, trained_score
from flux_ray.train.rank_batch import PerGroup, RankBatch
from flux_ray.train.setup import Place


class Trainer(Rank):
    """A rank of the group that trains what model.path names: a policy, or the objective's score model."""

    def __init__(self, config: Config, **place: Unpack[Place]) -> None:
        super().__init__(config, load=trained_score if config.is_score else trained_policy, **place)
        if isinstance(config.algo, LossConfig):
            self.kl_coef = config.algo.kl_coef
        self.returns: list[list[np.ndarray]] = []  # of the last step, by group and trajectory: what a critic learns
        self.made: policy_step.TokenValues | None = None  # of the groups that came last
        self.made_reference: PerGroup | None = None  # the reference's log-probs that were made here, of the same
        self._begun: policy_step.Begun | None = None  # what `accumulate` has done of the next step
        self._scores: list[ScoredGroup] = []  # of that step, so far

    def train_step(
        self, *, groups: Sequence[RolloutGroup], scores: Sequence[ScoredGroup],
        reference_logprobs: PerGroup | None, step: int, versions: Sequence[int] | None = None,
        values: PerGroup | None = None,
    ) -> StepReport:
        """One step on all ranks' groups (`groups` are this rank's, maybe none), and on those that were accumulated.

        `step`: how many are done; `versions`: those that hold its weights (None: the version of the same number).
        `values`: a critic's, as Critic.values gives them, for algorithms that need them. Where the policy without its
        adapter is the reference, its log-probs are made here. An update whose loss or gradient isn't finite is left
        out, and its batch kept in the run's folder.
        """
        batch = self._batch(groups, scores, reference_logprobs, step, versions)
        metrics, self.made = policy_step.run(
            self.engine, self._step_config, replace(batch, values=values), self._begun, keeps=self.keeps_rollouts)
        self.returns = by_group(self.made.returns, groups)
        self._begun = None
        return self._report(metrics, step + 1)

    def accumulate(
        self, *, groups: Sequence[RolloutGroup], scores: Sequence[ScoredGroup],
        reference_logprobs: PerGroup | None, step: int, versions: Sequence[int] | None = None,
    ) -> None:
        """Backward of some of a step's groups, on all ranks; `train_step` takes the last ones.

        The gradient is as if all groups came at once. For algorithms that don't need the whole batch.
        """
        batch = self._batch(groups, scores, reference_logprobs, step, versions)
        self._begun, self.made = policy_step.accumulate(self.engine, self._step_config, batch, self._begun,
                                                        keeps=self.keeps_rollouts)

    @property
    def adapts_kl(self) -> bool:
        return isinstance(self.config.algo, LossConfig) and self.config.algo.kl_target is not None

    @property
    def keeps_rollouts(self) -> bool:
        """Whether what a step makes of its tokens is written down."""
        config = self.config
        return isinstance(config, PolicyGradientConfig) and config.observability.rollouts_max_gib > 0

    @property
    def _policy_config(self) -> PolicyConfig:
        assert isinstance(self.config, PolicyConfig), self.config.algo.name
        return self.config

    @property
    def _step_config(self) -> PolicyConfig:
        return changed(self._policy_config, {"algo.kl_coef": self.kl_coef})

    def _batch(
        self, groups: Sequence[RolloutGroup], scores: Sequence[ScoredGroup], reference_logprobs: PerGroup | None,
        step: int, versions: Sequence[int] | None,
    ) -> RankBatch:
        self.made_reference = None
        if reference_logprobs is None and reference_is_base(self.config):
            temperature = self._policy_config.rollout.temperature
            rows = self.reference_logprobs(scoring_samples(groups), temperature=temperature)
            self.made_reference = reference_logprobs = by_group(rows, groups)
        self._scores += scores
        return RankBatch(groups, scores, step, (step,) if versions is None else versions, reference_logprobs)

    def sft_step(self, samples: Sequence[Sample]) -> StepReport:
        """One supervised step on all ranks' samples. Leaves out what `train_step` does."""
        metrics = sft_step.run(self.engine, self.config.batch, samples, total_updates=self.config.driver.num_steps)
        return self._report(metrics, self.step + 1)

    def sft_metrics(self, samples: Sequence[Sample]) -> dict[str, float]:
        """The metrics that `sft_step` would give of all ranks' samples; nothing is trained."""
        return read(self.engine.merge(sft_step.measure(self.engine, self.config.batch, samples)))

    def pair_step(
        self, *, pairs: Sequence[PreferencePair], reference_logprobs: Sequence[tuple[float, float]] | None,
    ) -> StepReport:
        """One step on all ranks' preference pairs. Leaves out what `train_step` does.

        `reference_logprobs`: of both responses, sums over each.
        """
        share = pair_step.PairShare(pairs, reference_logprobs)
        return self._report(pair_step.run(self.engine, self.config, share), self.step + 1)

    def pair_metrics(
        self, *, pairs: Sequence[PreferencePair], reference_logprobs: Sequence[tuple[float, float]] | None,
    ) -> dict[str, float]:
        """The metrics that `pair_step` would give of all ranks' pairs; nothing is trained."""
        share = pair_step.PairShare(pairs, reference_logprobs)
        return read(self.engine.merge(pair_step.measure(self.engine, self.config, share)))

    def pair_reference(self, pairs: Sequence[PreferencePair]) -> list[tuple[float, float]]:
        """Log-probs of this rank's pairs' responses under the policy without its adapter: (chosen, rejected) sums."""
        sums = response_sums(self.reference_logprobs(pair_samples(pairs), temperature=1.0))
        return list(zip(sums[::2], sums[1::2], strict=True))

    def _report(self, metrics: dict[str, Metric], step: int) -> StepReport:
        self.step = step
        self.keep_skipped(step, self._scores)
        self._scores = []
        merged = self.engine.merge(metrics)
        paid = merged.get("actor/reward_kl")
        moved = "train/grad_norm" in merged  # not while a critic learns alone: the policy stands still
        config = self.config.algo
        if (isinstance(config, LossConfig) and config.kl_target is not None
                and moved and isinstance(paid, Mean) and paid.weight):
            self.kl_coef = adapted_coef(self.kl_coef, kl=paid.value, target=config.kl_target,
                                        num_sequences=paid.weight, horizon=config.kl_horizon)
        return StepReport(step, read(merged))

    def logprobs(self, groups: Sequence[RolloutGroup]) -> list[list[np.ndarray]]:
        """Log-probs per group and trajectory, (T,) float32, 0 off the mask, at the rollout's temperature."""
        samples = scoring_samples(groups, with_experts=True)
        temperature = self._policy_config.rollout.temperature
        return by_group(policy_step.logprobs(self.engine, self.config.batch, samples, temperature=temperature), groups)

    def reference_logprobs(self, samples: Sequence[Sample], *, temperature: float) -> list[np.ndarray]:
        """Log-probs of each sample under the policy without its adapter, (T,) float32, 0 off the mask."""
        assert self.model.adapter is not None, "without an adapter the reference is another model"
        with self.model.adapter.off():
            return policy_step.logprobs(self.engine, self.config.batch, samples, temperature=temperature)
