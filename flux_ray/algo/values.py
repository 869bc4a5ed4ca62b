"""A critic's objective: the clipped value loss, and metrics of its values.

Takes:  values of the states before the loss tokens, now and before the batch's updates; the returns. All of one shape.
Gives:  `value_loss` per token; `value_objective`: (loss, metrics), which add up over micro-batches and ranks.
Never:  estimates an advantage: the estimators do.
"""

from __future__ import annotations

import torch

from flux_ray.formula import Formula
from flux_ray.observability.metrics import Explained, Mean, Metric, Sum

FORMULA = Formula("½·max((V − R_t)², (clip(V, V_old ± {critic.clip_range}) − R_t)²)",
                  "2005.12729, section 3", "R_t = A_t + V_old before whitening")


def value_loss(
    values: torch.Tensor, *, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(½·max((V − R)², (clip(V, V_old ± ε) − R)²), whether the clipped term is the larger one), per token.

    The pessimistic form of PPO's clip for values (1707.06347's own code; 2005.12729, section 3): no slope where V has
    left V_old's neighbourhood towards R and beyond, whichever side it left at.
    """
    clipped = torch.minimum(torch.maximum(values, old_values - clip_range), old_values + clip_range)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    return torch.maximum(plain_error, clipped_error) / 2, clipped_error > plain_error


def value_objective(
    values: torch.Tensor, *, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor,
    loss_weights: torch.Tensor, clip_range: float,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Σ w·loss over the loss tokens, and its metrics."""
    loss, clipped = value_loss(values, old_values=old_values, returns=returns, clip_range=clip_range)
    total = (loss.masked_fill(~mask, 0.0) * loss_weights).sum()
    with torch.no_grad():
        count = int(mask.sum())
        old, wanted = old_values[mask].double(), returns[mask].double()
        sums = torch.stack([old.sum(), wanted.sum(), clipped[mask].sum().double()]).tolist()
    return total, {
        "critic/loss": Sum(float(total.detach())),
        "critic/value_mean": Mean(sums[0], count),
        "critic/return_mean": Mean(sums[1], count),
        "critic/clip_frac": Mean(sums[2], count),
        "critic/explained_variance": Explained.of(wanted, wanted - old),
    }
