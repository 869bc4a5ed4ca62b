"""Policy losses, and their registry, which takes users' own.

Takes:  old and new log-probs, advantages and response mask, padded (B, L), and keywords (`config`).
Gives:  (loss per token (B, L), metrics); `register_policy_loss`, `get_policy_loss`, `list_policy_losses`.
Knows:  r = π/π_old, its logarithm clamped to ±20 before exp; objectives negated: every loss is minimised.
Never:  aggregates (the weights do), corrects for the sampler, or adds KL and entropy: the objective does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flux_ray.algo.kl import MAX_LOG_RATIO
from flux_ray.algo.metrics import Measured
from flux_ray.algo.rows import by_rows, with_slope
from flux_ray.config import AlgoConfig
from flux_ray.errors import UserError, unknown
from flux_ray.formula import Formula
from flux_ray.plugins import same_function

LossAndMetrics = tuple[torch.Tensor, Mapping[str, Measured]]
Surrogate = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # (B, L): loss, its slope by a log-ratio, was it clipped

MAX_RATIO = math.exp(MAX_LOG_RATIO)  # ratios are clamped to 1 / MAX_RATIO … MAX_RATIO, and have no slope beyond

_DEFAULTS = AlgoConfig()


def ppo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: object,
) -> LossAndMetrics:
    """−min(r·A, clip(r, 1−ε, 1+ε_high)·A) per token (1707.06347, eq. 7; bounds apart: 2503.14476, eq. 10).

    With `config.dual_clip` c and A < 0: −max(min(…), c·A) (1912.09729, eq. 5).
    """
    def block(old: torch.Tensor, new: torch.Tensor, advantages: torch.Tensor) -> Surrogate:
        return _clipped((new - old).exp_(), advantages, config)

    loss, slope, clipped = by_rows(block, old_log_prob, log_prob, advantages)
    return with_slope(log_prob, value=loss, slope=slope), {"actor/clip_frac": clipped}


def gspo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: object,
) -> LossAndMetrics:
    """−min(s·A, clip(s)·A), s = exp(mean_t log r_t), the same at all tokens of a sequence (2507.18071, eq. 5 and 7)."""
    log_s_B1 = _row_log_ratio(log_prob, old_log_prob, response_mask) / _row_length(response_mask)
    return _of_rows(log_s_B1, advantages, config)


def gspo_token(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: object,
) -> LossAndMetrics:
    """−min(s_t·A_t, clip(s_t)·A_t) with s_t = sg[s]·π/sg[π] (2507.18071, eq. 13 and 14)."""
    log_s_B1 = _row_log_ratio(log_prob.detach(), old_log_prob, response_mask) / _row_length(response_mask)
    s_B1 = log_s_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    loss, slope, clipped = by_rows(lambda s, a: _clipped(s, a, config), s_B1, advantages)
    return with_slope(log_prob, value=loss, slope=slope), {"actor/clip_frac": clipped}


def rloo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: object,
) -> LossAndMetrics:
    """−min(r·A, clip(r)·A) with the whole sequence's ratio r = exp(Σ_t log r_t) (2402.14740, clipped as PPO)."""
    return _of_rows(_row_log_ratio(log_prob, old_log_prob, response_mask), advantages, config)


def cispo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: object,
) -> LossAndMetrics:
    """−sg(min(r, 1+ε_high))·A·log π: the weight is clipped, never the gradient (2506.13585, eq. 4 and 5)."""
    bound = 1 + _high(config)

    def block(old: torch.Tensor, new: torch.Tensor, advantages: torch.Tensor) -> Surrogate:
        ratio = (new - old).exp_()
        slope = ratio.clamp(1 / MAX_RATIO, min(bound, MAX_RATIO)).mul_(advantages).neg_()
        return slope * new, slope, ratio > bound

    loss, slope, clipped = by_rows(block, old_log_prob, log_prob, advantages)
    return with_slope(log_prob, value=loss, slope=slope), {"actor/clip_frac": clipped}


def reinforce(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor,
    **_: object,
) -> LossAndMetrics:
    """−A·log π: no ratio, no clip."""
    return -advantages * log_prob, {}


def token_ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    """(B, L): π/π_old per token."""
    return torch.exp((log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def _row_log_ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """(B, 1): Σ_t log π/π_old over the loss tokens of each row; 0 for an empty row."""
    def block(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        return ((new - old).masked_fill_(~mask, 0.0).sum(-1, keepdim=True),)

    mask = response_mask.bool()
    (sums_B1,) = by_rows(block, log_prob, old_log_prob, mask)
    return with_slope(log_prob, value=sums_B1, slope=mask)


def _row_length(response_mask: torch.Tensor) -> torch.Tensor:
    """(B, 1): loss tokens of each row, at least 1."""
    return response_mask.sum(-1, keepdim=True).clamp(min=1)


def _high(config: AlgoConfig) -> float:
    return config.clip_range if config.clip_range_high is None else config.clip_range_high


def _of_rows(log_ratio_B1: torch.Tensor, advantages: torch.Tensor, config: AlgoConfig) -> LossAndMetrics:
    """The clipped surrogate of one ratio per row."""
    ratio_B1 = log_ratio_B1.detach().exp()
    loss, slope, clipped = by_rows(lambda r, a: _clipped(r, a, config), ratio_B1, advantages)
    by = log_ratio_B1.expand_as(loss)
    return with_slope(by, value=loss, slope=slope), {"actor/clip_frac": clipped}


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, config: AlgoConfig) -> Surrogate:
    """The clipped surrogate of a ratio that broadcasts to (B, L): the loss −r′·A, its slope by log r, and where r′ ≠ r.

    min(r·A, clip(r)·A) is r′·A with r′ = min(r, 1+ε_high) for A > 0, max(r, 1−ε) for A < 0, and a dual clip is a bound
    on the latter from above. Where r′ is r, the slope of −r·A by log r is −r·A itself; elsewhere it is 0.
    """
    falls = ratio.clamp(1 - config.clip_range, min(config.dual_clip or MAX_RATIO, MAX_RATIO))
    rises = ratio.clamp(1 / MAX_RATIO, min(1 + _high(config), MAX_RATIO))
    kept = torch.where(advantages < 0, falls, rises)
    clipped = (kept != ratio).logical_and_(advantages != 0)
    loss = kept.mul_(advantages).neg_()
    return loss, loss.masked_fill(clipped, 0.0), clipped


@dataclass(frozen=True)
class PolicyLoss:
    function: Callable[..., LossAndMetrics]
    formula: Formula       # of the term that a token adds; empty where none was given
    ratio: bool            # has π/π_old in it: the sampler's distribution must be the policy's
    sequence_level: bool   # one ratio per sequence: corrections must be per sequence too
    reads: tuple[str, ...] = ("clip_range", "clip_range_high", "dual_clip")  # which of these knobs
    ours: bool = True


CLIPPED = "−min({r}·A, clip({r}, 1 − {{clip_range}}, 1 + {{clip_range_high}})·A)"
DUAL_CLIP = {"dual_clip": "…, at most {dual_clip}·|A| where A < 0"}


def _clipped_formula(r: str, where: str, source: str) -> Formula:
    return Formula(CLIPPED.format(r=r), source, where, given=DUAL_CLIP)


#: name ► loss; `register_policy_loss` adds to it
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss(
        ppo, _clipped_formula("r", "r = π/π_old per token",
                              "1707.06347, eq. 7; two bounds: 2503.14476, eq. 10; dual clip: 1912.09729, eq. 5"),
        ratio=True, sequence_level=False),
    "gspo": PolicyLoss(
        gspo, _clipped_formula("s", "s = exp(mean_t log π/π_old), one per sequence", "2507.18071, eq. 5 and 7"),
        ratio=True, sequence_level=True),
    "gspo_token": PolicyLoss(
        gspo_token, _clipped_formula("s_t", "s_t = sg[s]·π/sg[π] with s = exp(mean_t log π/π_old)",
                                     "2507.18071, eq. 13 and 14"),
        ratio=True, sequence_level=True),
    "rloo": PolicyLoss(
        rloo, _clipped_formula("r", "r = exp(Σ_t log π/π_old), one per sequence", "2402.14740, clipped as in ppo"),
        ratio=True, sequence_level=True),
    "cispo": PolicyLoss(
        cispo, Formula("−sg(min(r, 1 + {clip_range_high}))·A·log π", "2506.13585, eq. 4 and 5",
                       "r = π/π_old per token"),
        ratio=True, sequence_level=False, reads=("clip_range", "clip_range_high")),
    "reinforce": PolicyLoss(
        reinforce, Formula("−A·log π", "Williams 1992"), ratio=False, sequence_level=False, reads=()),
}


def register_policy_loss(
    name: str, *, formula: str = "", ratio: bool = True, sequence_level: bool = False,
) -> Callable[[Callable[..., LossAndMetrics]], Callable[..., LossAndMetrics]]:
    """Register `f(old_log_prob, log_prob, advantages, response_mask, **kw) -> (loss, metrics)`.

    The loss is one number a token, (batch, length), which the step's weights aggregate; or a scalar, which is taken as
    the mean of this micro-batch. The metrics are name ► tensor (batch, length), number, or observability.metrics type.
    `kw` holds config and what `algo.options` holds.

    Args:
        name: For `algo.policy_loss`.
        formula: The text of the loss that `flux-ray explain` prints. In it `{slope}` is the option algo.options.slope.
        ratio: The loss has a ratio π/π_old. Without one `rollout.top_p` below 1 is allowed.
        sequence_level: It has one ratio for a whole sequence.

    Raises:
        UserError: The name is taken.
    """
    def add(function: Callable[..., LossAndMetrics]) -> Callable[..., LossAndMetrics]:
        if name in POLICY_LOSSES and not same_function(POLICY_LOSSES[name].function, function):
            raise UserError(f"policy loss {name!r} is taken: choose another name")
        POLICY_LOSSES[name] = PolicyLoss(
            function, Formula(formula), ratio=ratio, sequence_level=sequence_level, ours=False)
        return function
    return add


def get_policy_loss(name: str) -> Callable[..., LossAndMetrics]:
    return find_policy_loss(name).function


def find_policy_loss(name: str) -> PolicyLoss:
    """The registry's entry: the function and what it is."""
    if name not in POLICY_LOSSES:
        raise unknown("policy loss", name, POLICY_LOSSES)
    return POLICY_LOSSES[name]


def list_policy_losses() -> list[str]:
    return sorted(POLICY_LOSSES)
