"""Policy losses, and the registry that a user's own join.

Takes:  old and new log-probs, advantages and response mask, padded (B, L), and keywords (`config`).
Gives:  (loss per token (B, L), metrics); `register_policy_loss`, `get_policy_loss`, `list_policy_losses`.
Knows:  r = π/π_old, its logarithm clamped to ±20 before exp; objectives negated: every loss is minimised.
Never:  aggregates (the weights do), corrects for the sampler, or adds KL and entropy: the objective does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flux_ray.algo.kl import MAX_LOG_RATIO
from flux_ray.config import AlgoConfig
from flux_ray.errors import UserError, unknown
from flux_ray.plugins import same_function

LossAndMetrics = tuple[torch.Tensor, dict[str, Any]]

_DEFAULTS = AlgoConfig()


def ppo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: Any,
) -> LossAndMetrics:
    """−min(r·A, clip(r, 1−ε, 1+ε_high)·A) per token (1707.06347, eq. 7; bounds apart: 2503.14476, eq. 10).

    With `config.dual_clip` c and A < 0: −max(min(…), c·A) (1912.09729, eq. 5).
    """
    return _clipped(token_ratio(log_prob, old_log_prob), advantages, config)


def gspo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: Any,
) -> LossAndMetrics:
    """−min(s·A, clip(s)·A), s = exp(mean_t log r_t), the same at all tokens of a sequence (2507.18071, eq. 5 and 7)."""
    s_B1 = sequence_ratio(log_prob, old_log_prob, response_mask, mean=True)
    return _clipped(s_B1, advantages, config)


def gspo_token(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: Any,
) -> LossAndMetrics:
    """−min(s_t·A_t, clip(s_t)·A_t) with s_t = sg[s]·π/sg[π] (2507.18071, eq. 13 and 14)."""
    s_B1 = sequence_ratio(log_prob, old_log_prob, response_mask, mean=True).detach()
    return _clipped(s_B1 * torch.exp(log_prob - log_prob.detach()), advantages, config)


def rloo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: Any,
) -> LossAndMetrics:
    """−min(r·A, clip(r)·A) with the whole sequence's ratio r = exp(Σ_t log r_t) (2402.14740, clipped as PPO)."""
    r_B1 = sequence_ratio(log_prob, old_log_prob, response_mask, mean=False)
    return _clipped(r_B1, advantages, config)


def cispo(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, *,
    config: AlgoConfig = _DEFAULTS, **_: Any,
) -> LossAndMetrics:
    """−sg(min(r, 1+ε_high))·A·log π: the weight is clipped, never the gradient (2506.13585, eq. 4 and 5)."""
    ratio = token_ratio(log_prob, old_log_prob).detach()
    bound = 1 + _high(config)
    loss = -ratio.clamp(max=bound) * advantages * log_prob
    return loss, {"actor/clip_frac": ratio > bound}


def reinforce(
    old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor, response_mask: torch.Tensor, **_: Any,
) -> LossAndMetrics:
    """−A·log π: no ratio, no clip."""
    return -advantages * log_prob, {}


def token_ratio(log_prob: torch.Tensor, old_log_prob: torch.Tensor) -> torch.Tensor:
    """(B, L): π/π_old per token."""
    return torch.exp((log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def sequence_ratio(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, response_mask: torch.Tensor, *, mean: bool,
) -> torch.Tensor:
    """(B, 1): exp of the sum, or mean, of log π/π_old over the loss tokens of each row; 1 for an empty row."""
    mask = response_mask.bool()
    log_ratio_B1 = (log_prob - old_log_prob).masked_fill(~mask, 0.0).sum(-1, keepdim=True)
    if mean:
        log_ratio_B1 = log_ratio_B1 / mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.exp(log_ratio_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def _high(config: AlgoConfig) -> float:
    return config.clip_range if config.clip_range_high is None else config.clip_range_high


def _clipped(ratio: torch.Tensor, advantages: torch.Tensor, config: AlgoConfig) -> LossAndMetrics:
    """The clipped surrogate of any ratio that broadcasts to (B, L)."""
    plain = ratio * advantages
    chosen = torch.minimum(plain, ratio.clamp(1 - config.clip_range, 1 + _high(config)) * advantages)
    if config.dual_clip is not None:
        chosen = torch.where(advantages < 0, torch.maximum(chosen, config.dual_clip * advantages), chosen)
    return -chosen, {"actor/clip_frac": chosen.detach() != plain.detach()}


@dataclass(frozen=True)
class PolicyLoss:
    function: Callable[..., LossAndMetrics]
    ratio: bool            # has π/π_old in it: the sampler's distribution must be the policy's
    sequence_level: bool   # one ratio per sequence: corrections take their sequence form
    reads: tuple[str, ...] = ("clip_range", "clip_range_high", "dual_clip")  # those of these knobs that it reads
    ours: bool = True


#: name ► loss; `register_policy_loss` adds to it
POLICY_LOSSES: dict[str, PolicyLoss] = {
    "ppo": PolicyLoss(ppo, ratio=True, sequence_level=False),
    "gspo": PolicyLoss(gspo, ratio=True, sequence_level=True),
    "gspo_token": PolicyLoss(gspo_token, ratio=True, sequence_level=True),
    "rloo": PolicyLoss(rloo, ratio=True, sequence_level=True),
    "cispo": PolicyLoss(cispo, ratio=True, sequence_level=False, reads=("clip_range", "clip_range_high")),
    "reinforce": PolicyLoss(reinforce, ratio=False, sequence_level=False, reads=()),
}


def register_policy_loss(
    name: str, *, ratio: bool = True, sequence_level: bool = False,
) -> Callable[[Callable[..., LossAndMetrics]], Callable[..., LossAndMetrics]]:
    """Decorator: adds `f(old_log_prob, log_prob, advantages, response_mask, **kw) -> (loss, metrics)`.

    loss: per token (batch, length), which the step's weights aggregate, or a scalar, taken as this micro-batch's mean.
    metrics: name ► per-token tensor (batch, length), a number, or an observability.metrics type. kw: config and what
    `algo.options` holds. Raises ValueError for a name that is taken.
    """
    def add(function: Callable[..., LossAndMetrics]) -> Callable[..., LossAndMetrics]:
        if name in POLICY_LOSSES and not same_function(POLICY_LOSSES[name].function, function):
            raise UserError(f"policy loss {name!r} is taken: choose another name")
        POLICY_LOSSES[name] = PolicyLoss(function, ratio=ratio, sequence_level=sequence_level, ours=False)
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
