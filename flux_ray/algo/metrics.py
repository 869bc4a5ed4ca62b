"""The metrics of an update.

Takes:  per-token values (B, L) and the loss mask; log-probs on the flat axis.
Gives:  metrics that add up over micro-batches and ranks; `METRICS`, what each one is.
Knows:  a mean over loss tokens is a total and a count until it is read.
Never:  keeps a graph; waits for the device more than once a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch

from flux_ray.observability.described import Described, Range
from flux_ray.observability.metrics import Max, Mean, Metric, Std

Measured: TypeAlias = torch.Tensor | float | Metric  # (B, L); a number, which is a mean already; a metric

TOKENS = "loss tokens"
PRESENT = "loss tokens that the present version sampled; an asynchronous run takes a few of each engine's instead"

#: π new, π_old the ratio's denominator, μ what the sampler reported.
METRICS = (
    Described("actor/loss", "sum of weight × (policy loss + `beta`·KL − `entropy_coef`·H), over the updates of a step",
              over=TOKENS, healthy="near 0 in one update with normalised advantages, whatever is learned",
              otherwise="a nan is never trained on: `train/skipped`. Read other numbers for progress"),
    Described("actor/grpo_kl", "mean of the KL estimate of π to the reference, which `algo.beta` multiplies", "nat",
              TOKENS, Range(high=1.0),
              "the policy runs away from the reference: a lower `train.learning_rate`, or a larger `algo.beta`"),
    Described("actor/reward_kl", "mean over sequences of Σ_t log π_old − log π_ref, which `algo.kl_coef` multiplies in "
              "the reward", "nat", "loss tokens of a sequence", Range(high=100.0),
              "the policy exploits the reward model: raise `algo.kl_coef`, or set `algo.kl_target`"),
    Described("actor/kl_coef", "weight of that KL in this step's rewards; `algo.kl_target` adapts it", "reward / nat",
              healthy="settles",
              otherwise="runs to 0 or away: another `algo.kl_target`, or a longer `algo.kl_horizon`"),
    Described("actor/old_kl", "mean of log π_old − log π: how far the updates of this step went", "nat", TOKENS,
              Range(-0.2, 0.2, steps=3), "a lower learning rate, fewer `algo.epochs` or `algo.mini_batches`"),
    Described("actor/ratio_mean", "mean of π/π_old, its logarithm clamped to ±20; 1 in a step of one update",
              over=TOKENS, healthy=Range(0.5, 2.0, steps=3),
              otherwise="as `actor/old_kl`. In a run of one update, engine and trainer disagree "
              "(`weights/logprob_gap_mean`)"),
    Described("actor/clip_frac", "share whose clipped branch was taken (the term isn't r·A)", over=TOKENS,
              healthy=Range(high=0.5),
              otherwise="steps are too long: as `actor/old_kl`. Always 0 with several updates: the clip range is too "
              "wide"),
    Described("actor/entropy", "mean of the policy's entropy −Σ p·log p over the vocabulary", "nat", TOKENS,
              Range(low=0.01),
              "nothing is explored any more: a larger `algo.entropy_coef` or `algo.clip_range_high`, or a lower "
              "learning rate; nothing to do where the reward is at its top. Grows without end: `algo.entropy_coef=0`"),
    Described("actor/adv_mean", "mean of the advantages A", "reward (÷ std)", TOKENS),
    Described("actor/adv_std", "population standard deviation (ddof 0) of A", "reward (÷ std)", TOKENS, "above 0",
              "no group has different rewards: `reward/same_frac`"),
    Described("actor/NAME", "what a policy loss of your own returns under that name, as its mean", "", TOKENS),
    Described("critic/loss", "sum over updates of the mean of ½·max((V − R)², (clip(V, V_old ± ε) − R)²)", "reward²",
              TOKENS, "falls",
              "grows: a lower `critic.learning_rate`, or a wider `critic.clip_range` where rewards are large"),
    Described("critic/clip_frac", "share whose clipped term is the larger one", over=TOKENS, healthy="well below 1",
              otherwise="the reward's scale is above `critic.clip_range`"),
    Described("critic/value_mean", "mean of V_old, the values before the step's updates", "reward", TOKENS,
              "near `critic/return_mean`",
              "far from it for long: `critic.warmup_steps`, or start from the reward model (`critic.path`)"),
    Described("critic/return_mean", "mean of the returns R = A + V_old, A before whitening", "reward", TOKENS),
    Described("critic/explained_variance", "1 − Var(R − V_old) / Var(R), ddof 0: 1 for a perfect critic, 0 for a "
              "constant", over=TOKENS, healthy="above 0 after the first steps",
              otherwise="a larger `critic.learning_rate`, `critic.warmup_steps`"),
    Described("weights/logprob_gap_mean", "mean of |log π_old − log μ|", "nat", PRESENT,
              "≤ 1e-3 in fp32 (expect 1e-5), ≤ 3e-2 in bf16 (expect 1e-2); a run [begins with a "
              "check](models.md#the-check-at-the-start) of it, and tells where a later step is above",
              "engines sample from another distribution than the trainer learns on: look for an option in "
              "`rollout.engine_args` that changes the numbers, `train.lora.dropout`, or `model.dtype`"),
    Described("weights/logprob_gap_max", "largest |log π_old − log μ|", "nat", PRESENT, "≤ 1e-3 in fp32",
              "as `weights/logprob_gap_mean`"),
)


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
