"""Estimators of the KL divergence of one policy from another, by the tokens that were sampled.

Takes:  log-probs of the same tokens under both.
Gives:  one value per token; `adapted_coef`, the next weight of a KL in the reward.
Knows:  k1 is unbiased; k2 has the right gradient in a loss; k3 is unbiased and never negative (J. Schulman, 2020).
Never:  averages.
"""

from __future__ import annotations

import torch

MAX_ERROR = 0.2  # of the measured KL from its target, as a share of it, that one step answers (1909.08593)
MAX_LOG_RATIO = 20.0  # before exp: e^20 = 4.9e8 is beyond any use, and far from overflow in float32 (e^88)


def kl(log_prob: torch.Tensor, reference_log_prob: torch.Tensor, *, estimator: str) -> torch.Tensor:
    """KL(π‖π_ref) per token. k1 = log π/π_ref, k2 = k1²/2, k3 = π_ref/π − 1 + k1.

    k3 clamps k1 to ±20 in both its terms: clamping the exponential alone would leave a gradient of the wrong sign.
    """
    k1 = log_prob - reference_log_prob
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    assert estimator == "k3", estimator
    k1 = k1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(-k1) + k1


def adapted_coef(coef: float, *, kl: float, target: float, num_sequences: float, horizon: float) -> float:
    """coef * (1 + clip(kl / target - 1, +-0.2) * num_sequences / horizon) (1909.08593, section 2.2).

    kl: mean over sequences of the sum over their tokens.
    """
    error = min(max(kl / target - 1, -MAX_ERROR), MAX_ERROR)
    return coef * (1 + error * num_sequences / horizon)
