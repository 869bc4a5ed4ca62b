"""The algorithms: the estimator, loss and aggregation of each.

Takes:  an AlgoConfig.
Gives:  `resolve`: the Algorithm with the config's overrides; which log-probs a config needs beside the policy's.
Knows:  a registered estimator or loss is an algorithm by its own name too.
Never:  computes; sets an option (conf/algo/NAME.yaml holds those whose default differs for an algorithm).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from flux_ray import names
from flux_ray.algo.estimators import ESTIMATORS, find_adv_estimator
from flux_ray.algo.losses import POLICY_LOSSES, find_policy_loss
from flux_ray.config import (
    DEFAULT_ALGORITHM,
    Config,
    LossConfig,
    ObjectiveConfig,
    PairsAlgoConfig,
    PolicyAlgo,
    PolicyConfig,
    PolicyGradientConfig,
    PPOAlgoConfig,
    ReferencedConfig,
)
from flux_ray.errors import unknown


@dataclass(frozen=True)
class Algorithm:
    """Three choices and what follows from them."""

    name: str
    source: str                # arXiv number, where there is one
    estimator: str             # name in ESTIMATORS
    policy_loss: str           # name in POLICY_LOSSES
    aggregation: str           # what the loss weights are made from (the names are those of algo.aggregation)
    several_updates: bool = False  # per batch: epochs × mini_batches > 1 (`resolve` sets it)
    leaves_unwhitened: bool = False  # the estimator would whiten over the batch, and is told not to (`resolve` sets it)

    @property
    def needs_groups(self) -> bool:
        return find_adv_estimator(self.estimator).needs_groups

    @property
    def needs_whole_batch(self) -> bool:
        """Whether backward must wait until every group of the step is there."""
        estimator = find_adv_estimator(self.estimator)
        return self.several_updates or (estimator.needs_whole_batch and not self.leaves_unwhitened)

    @property
    def needs_critic(self) -> bool:
        return find_adv_estimator(self.estimator).needs_values

    @property
    def ratio_loss(self) -> bool:
        return find_policy_loss(self.policy_loss).ratio

    @property
    def sequence_level(self) -> bool:
        return find_policy_loss(self.policy_loss).sequence_level


ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("grpo", "2402.03300", "grpo", "ppo", "sequence_mean"),
        Algorithm("grpo_vectorized", "2402.03300", "grpo_vectorized", "ppo", "sequence_mean"),
        Algorithm("dr_grpo", "2503.20783", "dr_grpo", "ppo", "constant_length"),
        Algorithm("dapo", "2503.14476", "grpo", "ppo", "token_mean"),
        Algorithm("gspo", "2507.18071", "grpo", "gspo", "sequence"),
        Algorithm("gspo_token", "2507.18071", "grpo", "gspo_token", "sequence"),
        Algorithm("ppo", "1707.06347", "gae", "ppo", "token_mean"),
        Algorithm("rloo", "2402.14740", "rloo", "rloo", "sequence"),
        Algorithm("reinforce", "Williams 1992", "reinforce", "reinforce", "token_mean"),
        Algorithm("reinforce_pp", "2501.03262", "reinforce_pp", "ppo", "token_mean"),
        Algorithm("reinforce_pp_baseline", "2501.03262", "reinforce_pp_baseline", "ppo", "token_mean"),
        Algorithm("cispo", "2506.13585", "grpo", "cispo", "token_mean"),
    )
}


def resolve(config: LossConfig) -> Algorithm:
    """The algorithm of `config.name`, with the estimator, loss and aggregation that the config sets in their place.

    UserError for an unknown name, with the nearest known one.
    """
    algorithm = _find(names.ALGORITHM_ALIASES.get(config.name, config.name))
    algorithm = replace(
        algorithm,
        estimator=config.estimator or algorithm.estimator,
        policy_loss=config.policy_loss or algorithm.policy_loss,
        aggregation=config.aggregation or algorithm.aggregation,
        several_updates=config.epochs * config.mini_batches > 1,
    )
    find_policy_loss(algorithm.policy_loss)
    may_whiten = "whiten_advantages" in find_adv_estimator(algorithm.estimator).reads
    told_not_to = isinstance(config, PPOAlgoConfig) and not config.whiten_advantages
    return replace(algorithm, leaves_unwhitened=may_whiten and told_not_to)


def _find(name: str) -> Algorithm:
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if name in ESTIMATORS or name in POLICY_LOSSES:
        # What a user registered under one name: the default with the estimator, the loss, or both, of that name.
        default = ALGORITHMS[DEFAULT_ALGORITHM]
        return replace(default, name=name, source="", estimator=name if name in ESTIMATORS else default.estimator,
                       policy_loss=name if name in POLICY_LOSSES else default.policy_loss)
    raise unknown("algorithm", name, {*ALGORITHMS, *ESTIMATORS, *POLICY_LOSSES})


def needs_old_logprobs(config: PolicyAlgo) -> bool:
    """Whether the trainer computes π_old before its first update: for several updates, or a KL in the reward."""
    return config.kl_coef > 0 or (config.old_logprobs == "trainer" and config.epochs * config.mini_batches > 1)


def needs_reference(config: ObjectiveConfig) -> bool:
    """Whether any term asks for the frozen policy's log-probs."""
    if isinstance(config, LossConfig):
        return config.beta > 0 or config.kl_coef > 0
    return isinstance(config, PairsAlgoConfig) and not config.reference_free


def reference_is_base(config: Config) -> bool:
    """Whether the reference that is asked for is the policy without its adapter: the training ranks have it already."""
    if not isinstance(config, ReferencedConfig) or not needs_reference(config.algo):
        return False
    return config.train.lora.rank > 0 and config.reference.path is None


def masks_truncated(config: PolicyConfig) -> bool:
    """Whether truncated responses leave the loss. The soft penalty on length needs their gradient: not then.

    Given responses count as whole.
    """
    if not isinstance(config, PolicyGradientConfig):
        return False
    return config.algo.mask_truncated and not config.reward.overlong_penalty


def estimator_config(config: PolicyConfig) -> PolicyAlgo:
    """The config for estimators: the sum of rewards that were each normalised isn't divided by its std again."""
    alone = isinstance(config, PolicyGradientConfig) and config.reward.combine == "each"
    return replace(config.algo, normalize_by_std=False) if alone else config.algo
