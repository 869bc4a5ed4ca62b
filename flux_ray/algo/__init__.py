"""Advantages, losses, KL and the algorithms made of them; the registries that a user's own functions join.

Knows:  each name is loaded when it is first used: filters, which rollout workers need, do without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from flux_ray.algo.kl import adapted_coef
    from flux_ray.algo.losses import get_policy_loss, list_policy_losses, register_policy_loss
    from flux_ray.algo.metrics import METRICS, logprob_gap, reward_kl
    from flux_ray.algo.objective import policy_objective
    from flux_ray.algo.preferences import preference_objective, score_objective
    from flux_ray.algo.values import value_loss, value_objective

#: Name ► the module that has it.
_HOMES = {
    "ALGORITHMS": "flux_ray.algo.algorithms",
    "METRICS": "flux_ray.algo.metrics",
    "adapted_coef": "flux_ray.algo.kl",
    "compute_advantages": "flux_ray.algo.advantages",
    "estimator_config": "flux_ray.algo.algorithms",
    "get_adv_estimator": "flux_ray.algo.estimators",
    "get_policy_loss": "flux_ray.algo.losses",
    "list_adv_estimators": "flux_ray.algo.estimators",
    "list_policy_losses": "flux_ray.algo.losses",
    "logprob_gap": "flux_ray.algo.metrics",
    "masks_truncated": "flux_ray.algo.algorithms",
    "needs_old_logprobs": "flux_ray.algo.algorithms",
    "needs_reference": "flux_ray.algo.algorithms",
    "policy_objective": "flux_ray.algo.objective",
    "preference_objective": "flux_ray.algo.preferences",
    "reference_is_base": "flux_ray.algo.algorithms",
    "register_adv_estimator": "flux_ray.algo.estimators",
    "register_policy_loss": "flux_ray.algo.losses",
    "resolve": "flux_ray.algo.algorithms",
    "reward_kl": "flux_ray.algo.metrics",
    "score_objective": "flux_ray.algo.preferences",
    "value_loss": "flux_ray.algo.values",
    "value_objective": "flux_ray.algo.values",
    "Algorithm": "flux_ray.algo.algorithms",
}

__all__ = [
    "ALGORITHMS", "METRICS", "Algorithm", "adapted_coef", "compute_advantages", "estimator_config",
    "get_adv_estimator", "get_policy_loss", "list_adv_estimators", "list_policy_losses", "logprob_gap",
    "masks_truncated", "needs_old_logprobs", "needs_reference", "policy_objective", "preference_objective",
    "reference_is_base", "register_adv_estimator", "register_policy_loss", "resolve", "reward_kl", "score_objective",
    "value_loss", "value_objective",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
