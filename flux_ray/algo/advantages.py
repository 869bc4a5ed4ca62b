"""The advantages of a batch, by the algorithm's estimator.

Takes:  padded views (N, L) of whole groups, and the log-probs that a KL in the reward needs.
Gives:  (advantages, returns), both (N, L), 0 outside the mask.
Knows:  the KL in the reward; samples without a score (a nan reward), which the estimator never sees.
Never:  splits a group; computes a log-prob.
"""

from __future__ import annotations

from typing import Any

import torch

from flux_ray.algo.algorithms import Algorithm
from flux_ray.algo.estimators import Reduce, find_adv_estimator, on_one_rank
from flux_ray.algo.kl import kl
from flux_ray.config import AlgoConfig
from flux_ray.errors import UserError


def compute_advantages(
    algorithm: Algorithm,
    *,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: torch.Tensor,
    config: AlgoConfig,
    group_size: int,
    old_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    reduce: Reduce = on_one_rank,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, (N, L), of N rows in whole groups (`index`: the group of each row).

    With `config.kl_coef` each token's reward is first lessened by kl_coef·k1 of π_old to the reference. A row whose
    reward is nan leaves its group's statistics and gets advantage 0. `reduce` sums a small tensor over ranks: an
    estimator that whitens calls it once on every rank, rows or none. Raises UserError where a registered estimator
    gives a wrong shape or nan.
    """
    mask = response_mask.bool()
    if config.kl_coef:
        assert old_logprobs is not None and reference_logprobs is not None, "a KL in the reward needs both log-probs"
        penalty = kl(old_logprobs, reference_logprobs, estimator="k1").masked_fill(~mask, 0.0)
        token_level_rewards = token_level_rewards - config.kl_coef * penalty
    rows = token_level_rewards.sum(-1).isnan().logical_not().nonzero().squeeze(-1)
    whole = len(rows) == len(token_level_rewards)
    views = {"token_level_rewards": token_level_rewards, "response_mask": mask, "index": index,
             "old_log_prob": old_logprobs, "reference_log_prob": reference_logprobs, "values": values}
    if not whole:
        views = {name: None if view is None else view[rows] for name, view in views.items()}
    advantages, returns = _estimate(algorithm.estimator, views, {
        "group_size": group_size, "config": config, "reduce": reduce})
    if whole:
        return advantages, returns
    return tuple(torch.zeros_like(token_level_rewards).index_copy(0, rows, part.to(token_level_rewards.dtype))
                 for part in (advantages, returns))  # type: ignore[return-value]


def _estimate(name: str, views: dict[str, Any], settings: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    estimator = find_adv_estimator(name)
    config: AlgoConfig = settings["config"]
    if estimator.ours:
        return estimator.function(**views, **settings)
    result = estimator.function(**views, **{**settings, **config.options})
    if not (isinstance(result, tuple) and len(result) == 2 and all(isinstance(part, torch.Tensor) for part in result)):
        raise UserError(f"advantage estimator {name!r} gave {type(result).__name__}, wanted (advantages, returns)")
    mask = views["response_mask"]
    for what, part in zip(("advantages", "returns"), result, strict=True):
        if part.shape != mask.shape:
            raise UserError(f"advantage estimator {name!r}: {what} have shape {tuple(part.shape)}, "
                            f"wanted {tuple(mask.shape)}")
        if part[mask].isnan().any():
            raise UserError(f"advantage estimator {name!r}: {what} hold nan")
    advantages, returns = result
    return advantages.masked_fill(~mask, 0.0), returns.masked_fill(~mask, 0.0)
