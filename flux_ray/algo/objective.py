"""The objective that an update minimises: policy loss, KL and entropy, weighted.

Takes:  a micro-batch's padded views (B, L) and its loss weights.
Gives:  (loss, metrics): the sum of weight × per-token loss, which adds up over micro-batches and ranks.
Knows:  which policy is the ratio's denominator; the off-policy corrections; what a registered loss may return.
Never:  averages by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flux_ray.algo.algorithms import Algorithm
from flux_ray.algo.kl import MAX_LOG_RATIO, kl
from flux_ray.algo.losses import find_policy_loss, token_ratio
from flux_ray.algo.metrics import Measured, advantage_metrics, over_loss_tokens
from flux_ray.config import AlgoConfig, PolicyAlgo
from flux_ray.errors import UserError
from flux_ray.formula import Formula
from flux_ray.observability.metrics import Metric, Sum


def policy_objective(
    algorithm: Algorithm,
    config: PolicyAlgo,
    *,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor | None,
    sampler_log_prob: torch.Tensor | None,
    reference_log_prob: torch.Tensor | None,
    entropy: torch.Tensor | None,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_weights: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, Metric]]:
    """Σ w·(ℓ·correction + beta·KL(π‖π_ref) − entropy_coef·H) over the loss tokens, all tensors (B, L).

    old_log_prob: π_old; None where the batch has one update (π itself, detached). entropy: None where it isn't wanted.
    Raises UserError, naming the loss, where a registered one gives a wrong shape or nan.
    """
    mask = response_mask.bool()
    log_prob, old_log_prob, sampler_log_prob, reference_log_prob = (
        None if value is None else value.masked_fill(~mask, 0.0)
        for value in (log_prob, old_log_prob, sampler_log_prob, reference_log_prob)
    )
    assert log_prob is not None
    old = log_prob.detach() if old_log_prob is None else old_log_prob
    if config.old_logprobs == "sampler":
        assert sampler_log_prob is not None, "algo.old_logprobs=sampler needs the sampler's log-probs"
        assert config.off_policy == "none", "a ratio over the sampler's log-probs is its own correction"
        old = sampler_log_prob

    loss, measured = _policy_term(algorithm.policy_loss, config, old, log_prob, advantages, mask)
    if isinstance(config, AlgoConfig) and config.off_policy != "none":
        assert sampler_log_prob is not None, "an off-policy correction needs the sampler's log-probs"
        if loss.dim() == 0:
            raise UserError(f"policy loss {algorithm.policy_loss!r} gives a scalar, "
                            f"algo.off_policy={config.off_policy} needs a loss per token")
        loss = loss * off_policy_weight(old, sampler_log_prob, mask, config)
    total = loss * loss_weights.sum() if loss.dim() == 0 else _weighted(loss, mask, loss_weights)

    with torch.no_grad():
        measured |= {"actor/old_kl": old - log_prob, "actor/ratio_mean": token_ratio(log_prob, old)}
    if config.beta > 0:
        assert reference_log_prob is not None, "algo.beta needs the reference's log-probs"
    if reference_log_prob is not None:
        divergence = kl(log_prob, reference_log_prob, estimator=config.kl_estimator)
        measured["actor/grpo_kl"] = divergence
        total = total + config.beta * _weighted(divergence, mask, loss_weights) if config.beta else total
    if entropy is not None:
        measured["actor/entropy"] = entropy
    if config.entropy_coef:
        assert entropy is not None, "algo.entropy_coef needs the entropy"
        total = total - config.entropy_coef * _weighted(entropy, mask, loss_weights)
    metrics = over_loss_tokens(measured, response_mask=mask) | advantage_metrics(advantages, response_mask=mask)
    return total, metrics | {"actor/loss": Sum(total.item())}


def off_policy_weight(
    old_log_prob: torch.Tensor, sampler_log_prob: torch.Tensor, mask: torch.Tensor, config: AlgoConfig,
) -> torch.Tensor:
    """The weight of ρ, without gradient: ρ = π_old/μ per token, (B, L), or exp(Σ log π_old/μ) per sequence, (B, 1)."""
    log_ratio = (old_log_prob - sampler_log_prob).detach().masked_fill(~mask, 0.0)
    if config.off_policy_level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return CORRECTIONS[config.off_policy].function(ratio, config)


def _tis(ratio: torch.Tensor, config: AlgoConfig) -> torch.Tensor:
    return ratio.clamp(max=config.tis_cap)


def _icepop(ratio: torch.Tensor, config: AlgoConfig) -> torch.Tensor:
    return ratio.masked_fill((ratio < config.icepop_low) | (ratio > config.icepop_high), 0.0)


@dataclass(frozen=True)
class Correction:
    function: Callable[[torch.Tensor, AlgoConfig], torch.Tensor]  # of ρ
    formula: Formula  # of the factor of the policy term


#: the names are those of algo.off_policy
CORRECTIONS = {
    "tis": Correction(_tis, Formula("sg(min(ρ, {tis_cap}))", "F. Yao et al. 2025")),
    "icepop": Correction(_icepop, Formula("sg(ρ) inside [{icepop_low}, {icepop_high}], 0 outside", "2510.18855")),
}


def _weighted(values: torch.Tensor, mask: torch.Tensor, loss_weights: torch.Tensor) -> torch.Tensor:
    return (values.masked_fill(~mask, 0.0) * loss_weights).sum()


def _policy_term(
    name: str, config: PolicyAlgo, old_log_prob: torch.Tensor, log_prob: torch.Tensor, advantages: torch.Tensor,
    mask: torch.Tensor,
) -> tuple[torch.Tensor, dict[str, Measured]]:
    """The loss per token, or a registered loss's scalar, and its metrics."""
    entry = find_policy_loss(name)
    if entry.ours:
        loss, measured = entry.function(old_log_prob, log_prob, advantages, mask, config=config)
        return loss, dict(measured)
    result = entry.function(old_log_prob, log_prob, advantages, mask, **{"config": config, **config.options})
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.Tensor)):
        raise UserError(f"policy loss {name!r} gave {type(result).__name__}, wanted (loss, metrics)")
    loss, measured = result
    if loss.dim() and loss.shape != mask.shape:
        raise UserError(f"policy loss {name!r}: the loss has shape {tuple(loss.shape)}, "
                        f"wanted {tuple(mask.shape)} or a scalar")
    if (loss[mask] if loss.dim() else loss).isnan().any():
        raise UserError(f"policy loss {name!r}: the loss is nan")
    return loss, {key if "/" in key else f"actor/{key}": value for key, value in measured.items()}
