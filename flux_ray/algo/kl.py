"""Estimators of the KL divergence of one policy from another, at the sampled tokens.

Takes:  log-probs of the same tokens under both policies.
Gives:  one value per token; `adapted_coef`, the next weight of a KL in the reward.
Knows:  k1 is unbiased; k2 has the right gradient in a loss; k3 is unbiased and never negative (J. Schulman, 2020).
Never:  averages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flux_ray.formula import Formula

MAX_ERROR = 0.2  # a step answers to no larger relative error of the KL from its target (1909.08593)
MAX_LOG_RATIO = 20.0  # before exp: e^20 = 4.9e8 is beyond any use, and far from overflow in float32 (e^88)


def kl(log_prob: torch.Tensor, reference_log_prob: torch.Tensor, *, estimator: str) -> torch.Tensor:
    """KL(π‖π_ref) per token, by one of KL_ESTIMATORS."""
    return KL_ESTIMATORS[estimator].function(log_prob - reference_log_prob)


def _k3(k1: torch.Tensor) -> torch.Tensor:
    """Clamped to ±20 in both its terms: clamping the exponential alone would leave a gradient of the wrong sign."""
    k1 = k1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-k1) + k1


@dataclass(frozen=True)
class KlEstimator:
    function: Callable[[torch.Tensor], torch.Tensor]  # of log π/π_ref per token
    formula: Formula


#: the names are those of algo.kl_estimator
KL_ESTIMATORS = {
    "k1": KlEstimator(lambda k1: k1, Formula("log π/π_ref", "J. Schulman 2020", "π is π_old: in the reward alone")),
    "k2": KlEstimator(lambda k1: k1.square() / 2, Formula("(log π/π_ref)²/2", "J. Schulman 2020")),
    "k3": KlEstimator(_k3, Formula("π_ref/π − 1 + log π/π_ref", "J. Schulman 2020; 2402.03300, eq. 4")),
}


def adapted_coef(coef: float, *, kl: float, target: float, num_sequences: float, horizon: float) -> float:
    """coef * (1 + clip(kl / target - 1, +-0.2) * num_sequences / horizon) (1909.08593, section 2.2).

    kl: mean over sequences of the sum over their tokens.
    """
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return coef * (1 + error * num_sequences / horizon)
