"""The supervised objective: the next token of completions.

Takes:  log-probs of the tokens and their loss weights, of one shape.
Gives:  `next_token_loss`, which adds up over micro-batches and ranks.
"""

from __future__ import annotations

from torch import Tensor

from flux_ray.formula import Formula

AGGREGATION = "token_mean"

FORMULA = Formula("−log π", where="π is that of each token of the completion and of its end token")


def next_token_loss(logprobs: Tensor, *, loss_weights: Tensor) -> Tensor:
    """Σ w·(−log π); w is 0 outside the completion and its end token."""
    return -(logprobs * loss_weights).sum()
