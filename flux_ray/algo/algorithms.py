"""The algorithms: which estimator, loss and aggregation each is made of.

Takes:  an AlgoConfig.
Gives:  `resolve`: the Algorithm with the config's overrides; `defaults`: the knobs an algorithm sets otherwise than config.py.
Knows:  the aliases; a registered estimator or loss is an algorithm by its own name too.
Never:  computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flux_ray.algo.estimators import ESTIMATORS, find_adv_estimator
from flux_ray.algo.losses import POLICY_LOSSES, find_policy_loss
from flux_ray.config import AlgoConfig
from flux_ray.errors import unknown


@dataclass(frozen=True)
class Algorithm:
    """Three choices and what follows from them."""

    name: str
    source: str                # arXiv number
    estimator: str             # name in ESTIMATORS
    policy_loss: str           # name in POLICY_LOSSES
    aggregation: str           # token_mean, sequence_mean, constant_length or sequence: what the loss weights are made from
    several_updates: bool = False                                     # set by `resolve`: epochs × mini_batches > 1
    defaults: Mapping[str, Any] = field(default_factory=dict)         # knobs of AlgoConfig that differ from config.py

    @property
    def needs_groups(self) -> bool:
        return find_adv_estimator(self.estimator).needs_groups

    @property
    def needs_whole_batch(self) -> bool:
        """Whether backward must wait until every group of the step is there."""
        return self.several_updates or find_adv_estimator(self.estimator).needs_whole_batch

    @property
    def ratio_loss(self) -> bool:
        return find_policy_loss(self.policy_loss).ratio

    @property
    def sequence_level(self) -> bool:
        return find_policy_loss(self.policy_loss).sequence_level


_NO_KL_IN_LOSS = {"beta": 0.0, "entropy_coef": 0.0}
_GSPO = {**_NO_KL_IN_LOSS, "clip_range": 3e-4, "clip_range_high": 4e-4, "off_policy_level": "sequence"}

ALGORITHMS: dict[str, Algorithm] = {
    algorithm.name: algorithm
    for algorithm in (
        Algorithm("grpo", "2402.03300", "grpo", "ppo", "sequence_mean"),
        Algorithm("grpo_vectorized", "2402.03300", "grpo_vectorized", "ppo", "sequence_mean"),
        Algorithm("dr_grpo", "2503.20783", "dr_grpo", "ppo", "constant_length",
                  defaults={**_NO_KL_IN_LOSS, "normalize_by_std": False}),
        Algorithm("dapo", "2503.14476", "grpo", "ppo", "token_mean",
                  defaults={**_NO_KL_IN_LOSS, "clip_range_high": 0.28, "mask_truncated": True}),
        Algorithm("gspo", "2507.18071", "grpo", "gspo", "sequence", defaults=_GSPO),
        Algorithm("gspo_token", "2507.18071", "grpo", "gspo_token", "sequence", defaults=_GSPO),
        Algorithm("rloo", "2402.14740", "rloo", "rloo", "sequence",
                  defaults={**_NO_KL_IN_LOSS, "kl_coef": 0.05, "off_policy_level": "sequence"}),
        Algorithm("reinforce", "", "reinforce", "reinforce", "token_mean", defaults=_NO_KL_IN_LOSS),
        Algorithm("reinforce_pp", "2501.03262", "reinforce_pp", "ppo", "token_mean",
                  defaults={**_NO_KL_IN_LOSS, "kl_coef": 0.01}),
        Algorithm("reinforce_pp_baseline", "2501.03262", "reinforce_pp_baseline", "ppo", "token_mean",
                  defaults={"entropy_coef": 0.0, "kl_estimator": "k2"}),
        Algorithm("cispo", "2506.13585", "grpo", "cispo", "token_mean", defaults={**_NO_KL_IN_LOSS, "clip_range_high": 4.0}),
    )
}

#: other spellings ► the one name
ALIASES = {"drgrpo": "dr_grpo", "dr-grpo": "dr_grpo"}


def resolve(config: AlgoConfig) -> Algorithm:
    """The algorithm of `config.name` with the estimator, loss and aggregation that the config sets instead of its own.

    Raises UserError for a name that isn't known, with the nearest that is.
    """
    algorithm = _find(ALIASES.get(config.name, config.name))
    algorithm = replace(
        algorithm,
        estimator=config.estimator or algorithm.estimator,
        policy_loss=config.policy_loss or algorithm.policy_loss,
        aggregation=config.aggregation or algorithm.aggregation,
        several_updates=config.epochs * config.mini_batches > 1,
    )
    find_adv_estimator(algorithm.estimator)
    find_policy_loss(algorithm.policy_loss)
    return algorithm


def _find(name: str) -> Algorithm:
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    if name in ESTIMATORS or name in POLICY_LOSSES:
        # What a user registered under one name: grpo with the estimator, the loss, or both, of that name.
        estimator = name if name in ESTIMATORS else "grpo"
        return Algorithm(name, "", estimator, name if name in POLICY_LOSSES else "ppo", "sequence_mean")
    raise unknown("algorithm", name, {*ALGORITHMS, *ESTIMATORS, *POLICY_LOSSES})


def defaults(name: str) -> dict[str, Any]:
    """The knobs of AlgoConfig that this algorithm sets otherwise than config.py; empty for a user's own."""
    return dict(_find(ALIASES.get(name, name)).defaults)


def needs_reference(config: AlgoConfig) -> bool:
    """Whether any term asks for the frozen policy's log-probs."""
    return config.beta > 0 or config.kl_coef > 0


def needs_old_logprobs(config: AlgoConfig) -> bool:
    """Whether the trainer computes π_old before its first update: for the ratio of several updates, or the KL in the reward."""
    return config.kl_coef > 0 or (config.old_logprobs == "trainer" and config.epochs * config.mini_batches > 1)
