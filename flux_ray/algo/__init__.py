"""Advantages, losses, KL and the algorithms made of them; the registries that a user's own functions join."""

from flux_ray.algo.advantages import compute_advantages
from flux_ray.algo.algorithms import (
    ALGORITHMS,
    Algorithm,
    estimator_config,
    masks_truncated,
    needs_old_logprobs,
    needs_reference,
    reference_is_base,
    resolve,
)
from flux_ray.algo.estimators import get_adv_estimator, list_adv_estimators, register_adv_estimator
from flux_ray.algo.kl import adapted_coef, kl
from flux_ray.algo.losses import get_policy_loss, list_policy_losses, register_policy_loss
from flux_ray.algo.metrics import METRICS, logprob_gap, reward_kl
from flux_ray.algo.objective import policy_objective
from flux_ray.algo.preferences import preference_objective, score_objective
from flux_ray.algo.values import value_loss, value_objective

__all__ = [
    "ALGORITHMS", "METRICS", "Algorithm", "adapted_coef", "compute_advantages", "estimator_config",
    "get_adv_estimator", "get_policy_loss", "kl", "list_adv_estimators", "list_policy_losses", "logprob_gap",
    "masks_truncated", "needs_old_logprobs", "needs_reference", "policy_objective", "preference_objective",
    "reference_is_base", "register_adv_estimator", "register_policy_loss", "resolve", "reward_kl", "score_objective",
    "value_loss", "value_objective",
]
