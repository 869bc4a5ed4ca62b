"""The advantages of a batch, by the algorithm's estimator.

Takes:  padded views (N, L) of whole groups, and the log-probs that a KL in the reward needs; ways to the other ranks.
Gives:  (advantages, returns), both (N, L), 0 outside the mask.
Knows:  the KL in the reward; samples without a score (a nan reward), which the estimator never sees.
Never:  splits a group; computes a log-prob.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

from flux_ray.algo.algorithms import Algorithm
from flux_ray.algo.estimators import Reduce, find_adv_estimator, on_one_rank
from flux_ray.algo.kl import kl
from flux_ray.config import PolicyAlgo
from flux_ray.errors import UserError

Views = dict[str, Any]  # by the keyword of estimators: (N, L) or (N,) tensors, or None
#: Takes this rank's views; gives every rank's, in the order of the ranks, and this rank's place. Collective.
Everyone = Callable[[Views], tuple[list[Views], int]]


def compute_advantages(
    algorithm: Algorithm,
    *,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: torch.Tensor,
    config: PolicyAlgo,
    group_size: int,
    old_logprobs: torch.Tensor | None = None,
    reference_logprobs: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    sampled_mask: torch.Tensor | None = None,
    reduce: Reduce = on_one_rank,
    everyone: Everyone | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, (N, L), of N rows in whole groups (`index`: the group of each row).

    With `config.kl_coef` each token's reward is first lessened by kl_coef·k1 of π_old to the reference. `sampled_mask`
    has also the tokens of rows that leave the loss: a truncated sample's score counts in its group, and so does its KL.
    A row whose reward is nan leaves its group's statistics and gets advantage 0. `reduce` sums a small tensor over
    ranks: our estimators that whiten call it once on every rank, with rows or without. A registered estimator that
    needs the whole batch gets every rank's rows, by `everyone`. UserError where it gives a wrong shape or nan.
    """
    mask = response_mask.bool()
    if config.kl_coef:
        assert old_logprobs is not None and reference_logprobs is not None, "a KL in the reward needs both log-probs"
        penalty = kl(old_logprobs, reference_logprobs, estimator="k1")
        penalty = penalty.masked_fill(~(mask if sampled_mask is None else sampled_mask), 0.0)
        token_level_rewards = token_level_rewards - config.kl_coef * penalty
    rows = token_level_rewards.sum(-1).isnan().logical_not().nonzero().squeeze(-1)
    whole = len(rows) == len(token_level_rewards)
    views = {"token_level_rewards": token_level_rewards, "response_mask": mask, "index": index,
             "old_log_prob": old_logprobs, "reference_log_prob": reference_logprobs, "values": values}
    if not whole:
        views = {name: None if view is None else view[rows] for name, view in views.items()}
    estimator = find_adv_estimator(algorithm.estimator)
    if everyone is None or estimator.ours or not estimator.needs_whole_batch:
        advantages, returns = _estimate(algorithm.estimator, views, config, group_size=group_size, reduce=reduce)
    else:
        advantages, returns = _estimate_whole(algorithm.estimator, views, config, group_size=group_size,
                                              everyone=everyone)
    if whole:
        return advantages, returns
    return tuple(torch.zeros_like(token_level_rewards).index_copy(0, rows, part.to(token_level_rewards.dtype))
                 for part in (advantages, returns))  # type: ignore[return-value]


def _estimate_whole(
    name: str, views: Views, config: PolicyAlgo, *, group_size: int, everyone: Everyone,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's rows, estimated among the rows of all ranks."""
    shares, place = everyone(views)
    num_rows, length = views["response_mask"].shape
    longest = max(share["response_mask"].shape[1] for share in shares)
    whole = {key: None if view is None else torch.cat([_padded(share[key], longest) for share in shares])
             for key, view in views.items()}
    first = sum(len(share["response_mask"]) for share in shares[:place])
    advantages, returns = _estimate(name, whole, config, group_size=group_size, reduce=on_one_rank)
    return advantages[first : first + num_rows, :length], returns[first : first + num_rows, :length]


def _padded(view: torch.Tensor, length: int) -> torch.Tensor:
    """(N, L) to that length with zeros; (N,) as it is."""
    return view if view.ndim == 1 else pad(view, (0, length - view.shape[1]))


def _estimate(
    name: str, views: Views, config: PolicyAlgo, *, group_size: int, reduce: Reduce,
) -> tuple[torch.Tensor, torch.Tensor]:
    estimator = find_adv_estimator(name)
    settings = {"group_size": group_size, "config": config, "reduce": reduce}
    if estimator.ours:
        return estimator.function(**views, **settings)
    if not len(views["response_mask"]):  # a rank without groups: users' functions needn't handle it
        return torch.zeros_like(views["token_level_rewards"]), torch.zeros_like(views["token_level_rewards"])
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
