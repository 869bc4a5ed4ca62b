"""The metrics of an update.

Takes:  per-token values (B, L) and the loss mask; log-probs on the flat axis.
Gives:  metrics that add up over micro-batches and ranks; `METRICS`, each one's formula, unit and mask.
Knows:  a mean over loss tokens is a total and a count until it is read.
Never:  keeps a graph; waits for the device more than once a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from flux_ray.observability.metrics import Max, Mean, Metric, Std

Measured: TypeAlias = torch.Tensor | float | Metric  # (B, L); a number, which is a mean already; a metric

#: name ► (formula, unit, over which tokens). π new, π_old the ratio's denominator, μ what the sampler reported.
METRICS: dict[str, tuple[str, str, str]] = {
    "actor/loss": ("sum of weight × (policy loss + beta·KL − entropy_coef·H), over the updates of a step", "1",
                   "loss tokens"),
    "actor/grpo_kl": ("mean of the KL estimate of π to the reference that beta multiplies", "nat", "loss tokens"),
    "actor/old_kl": ("mean of log π_old − log π", "nat", "loss tokens"),
    "actor/clip_frac": ("share whose clipped branch was taken (the term isn't r·A)", "1", "loss tokens"),
    "actor/entropy": ("mean of the policy's entropy −Σ p·log p over the vocabulary", "nat", "loss tokens"),
    "actor/adv_mean": ("mean of A", "reward (÷ std)", "loss tokens"),
    "actor/adv_std": ("population standard deviation (ddof 0) of A", "reward (÷ std)", "loss tokens"),
    "actor/ratio_mean": ("mean of π/π_old per token, its logarithm clamped to ±20", "1", "loss tokens"),
    "actor/reward_kl": ("mean over sequences of Σ_t k1 of π_old to the reference, which kl_coef multiplies", "nat",
                        "loss tokens of a sequence"),
    "actor/kl_coef": ("weight of that KL in this step's rewards", "reward / nat", "none"),
    "critic/loss": ("sum over updates of the token mean of ½·max((V − R)², (clip(V, V_old ± ε) − R)²)", "reward²",
                    "loss tokens"),
    "critic/clip_frac": ("share whose clipped term is the larger one", "1", "loss tokens"),
    "critic/value_mean": ("mean of V_old, the values before the step's updates", "reward", "loss tokens"),
    "critic/return_mean": ("mean of the returns R = A + V_old, A before whitening", "reward", "loss tokens"),
    "critic/explained_variance": ("1 − Var(R − V_old) / Var(R), ddof 0: 1 for a perfect critic, 0 for a constant",
                                  "1", "loss tokens"),
    "weights/logprob_gap_mean": ("mean of |log π_old − log μ|", "nat", "loss tokens of samples of the current version"),
    "weights/logprob_gap_max": ("largest |log π_old − log μ|", "nat", "loss tokens of samples of the current version"),
}


def over_loss_tokens(values: Mapping[str, Measured], *, response_mask: torch.Tensor) -> dict[str, Metric]:
    """name ► Mean over the loss tokens; metrics are kept as they are."""
    mask = response_mask.bool()
    tensors = {name: v for name, v in values.items() if isinstance(v, torch.Tensor) and v.shape == mask.shape}
    sums = [value.detach().masked_fill(~mask, 0).sum(dtype=torch.float64) for value in tensors.values()]
    count, *totals = torch.stack([mask.sum().double(), *sums]).tolist()
    metrics: dict[str, Metric] = {name: Mean(total, count) for name, total in zip(tensors, totals, strict=True)}
    for name, value in values.items():
        if name not in tensors:
            metrics[name] = value if isinstance(value, Metric) else Mean(float(value) * count, count)
    return metrics


def advantage_metrics(advantages: torch.Tensor, *, response_mask: torch.Tensor) -> dict[str, Metric]:
    chosen = advantages.detach()[response_mask.bool()].double()
    total, squares = torch.stack([chosen.sum(), chosen.square().sum()]).tolist()
    return {"actor/adv_mean": Mean(total, len(chosen)), "actor/adv_std": Std(total, squares, len(chosen))}


def reward_kl(
    old_logprobs: torch.Tensor, reference_logprobs: torch.Tensor, *, response_mask: torch.Tensor, coef: float,
) -> dict[str, Metric]:
    """The KL in the reward, per sequence that has a loss token, and the weight it had."""
    sums_N = (old_logprobs - reference_logprobs).masked_fill(~response_mask.bool(), 0.0).sum(-1, dtype=torch.float64)
    num_sequences = int(response_mask.any(-1).sum())
    return {"actor/reward_kl": Mean(float(sums_N.sum()), num_sequences), "actor/kl_coef": Max(coef)}


def logprob_gap(
    logprobs_S: torch.Tensor, sampler_logprobs_S: torch.Tensor, mask_S: torch.Tensor,
) -> dict[str, Metric]:
    """How far the trainer's log-probs are from the sampler's, over the mask's tokens; empty where the mask is."""
    gap = (logprobs_S.detach() - sampler_logprobs_S)[mask_S].abs().double()
    if not len(gap):
        return {}
    total, largest = torch.stack([gap.sum(), gap.max()]).tolist()
    return {"weights/logprob_gap_mean": Mean(total, len(gap)), "weights/logprob_gap_max": Max(largest)}
