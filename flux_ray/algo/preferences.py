"""Objectives on preference pairs.

Takes:  the model's log-probs or scores of both responses of each pair, (B, 2): chosen, rejected; the reference's.
Gives:  (loss, metrics): the sum over pairs divided by the step's number of pairs, which adds up over micro-batches.
Knows:  dpo, ipo, cdpo on log-probs of whole responses; Bradley-Terry on scores; what each metric is (METRICS).
Never:  sees a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from flux_ray.config import IPOAlgoConfig, PairsAlgoConfig
from flux_ray.formula import Formula
from flux_ray.observability.described import Described
from flux_ray.observability.metrics import Mean, Metric

#: Evaluations have the same after eval/.
METRICS = (
    Described("train/loss", "pairs: mean of the objective; sft: mean of −log π", "1; sft: nat",
              "pairs; sft: completions' tokens", "falls",
              "does not fall: look at the learning rate and the data. Falls while `eval/loss` rises: stop earlier"),
    Described("pairs/chosen_reward",
              "mean of r_w: β·(log π − log π_ref) of the chosen response, or its score", "reward",
              "pairs"),
    Described("pairs/rejected_reward", "mean of r_l, the rejected response's", "reward", "pairs", "",
              "both fall: that is usual for dpo, which learns only their difference"),
    Described("pairs/margin", "mean of r_w − r_l", "reward", "pairs", "grows",
              "grows while `eval/accuracy` doesn't: too many steps, or `algo=ipo`"),
    Described("pairs/accuracy", "share with r_w > r_l, a tie counts one half", "1", "pairs", "above 0.5",
              "stays at 0.5: a larger learning rate is needed, or labels say nothing. Near 1 at once: length alone may "
              "tell the pairs apart"),
)


def dpo(gap_B: Tensor, *, beta: float) -> Tensor:
    """−log σ(beta·h) per pair (2305.18290, eq. 7). gap_B is h: log π/π_ref of the chosen less that of the rejected."""
    return -logsigmoid(beta * gap_B)


def cdpo(gap_B: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """−(1 − ε)·log σ(beta·h) − ε·log σ(−beta·h): labels that are wrong with probability ε (E. Mitchell, 2023)."""
    return (1 - label_smoothing) * dpo(gap_B, beta=beta) + label_smoothing * dpo(-gap_B, beta=beta)


def ipo(gap_B: Tensor, *, beta: float) -> Tensor:
    """(h − 1/(2·beta))² per pair (2310.12036, eq. 17)."""
    return (gap_B - 1 / (2 * beta)).square()


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin_B: Tensor) -> Tensor:
    """−log σ(s_w − s_l − margin) per pair (2203.02155, eq. 1; the margin: 2307.09288, eq. 2)."""
    return -logsigmoid(chosen_B - rejected_B - margin_B)


#: objective ► its loss per pair, from h and the config
LOSSES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "dpo": lambda gap_B, config: dpo(gap_B, beta=config.beta),
    "cdpo": lambda gap_B, config: cdpo(gap_B, beta=config.beta, label_smoothing=config.label_smoothing),
    "ipo": lambda gap_B, config: ipo(gap_B, beta=config.beta),
}

H = "h = log π/π_ref of the chosen response less that of the rejected, each the {} over its tokens"

#: objective ► what each pair adds to the mean over pairs
FORMULAS = {
    "dpo": Formula("−log σ({beta}·h)", "2305.18290, eq. 7", H.format("sum"), reads=("reference_free",)),
    "cdpo": Formula("−(1 − {label_smoothing})·log σ({beta}·h) − {label_smoothing}·log σ(−{beta}·h)",
                    "E. Mitchell 2023", H.format("sum"), reads=("reference_free",)),
    "ipo": Formula("(h − 1/(2·{beta}))²", "2310.12036, eq. 17 (there of sums)", H.format("mean, or the sum,"),
                   reads=("reference_free", "pair_logprobs")),
    "reward_model": Formula("−log σ(s_w − s_l − margin)", "2203.02155, eq. 1; the margin: 2307.09288, eq. 2",
                            "s_w and s_l are the scores of the chosen and the rejected text, each at its last token"),
}


def preference_objective(
    config: PairsAlgoConfig, *, logprobs: Tensor, reference_logprobs: Tensor | None, num_tokens: Tensor, num_pairs: int,
) -> tuple[Tensor, dict[str, Metric]]:
    """The loss of `config.name` on B pairs of a step of `num_pairs`.

    logprobs, reference_logprobs: (B, 2), sums over each response's tokens; None: a reference that holds all responses
    equally likely. num_tokens: (B, 2) tokens of each response, for algo.pair_logprobs=mean.
    """
    log_ratio_B2 = logprobs if reference_logprobs is None else logprobs - reference_logprobs
    if isinstance(config, IPOAlgoConfig) and config.pair_logprobs == "mean":
        log_ratio_B2 = log_ratio_B2 / num_tokens
    loss_B = LOSSES[config.name](log_ratio_B2[:, 0] - log_ratio_B2[:, 1], config)
    return loss_B.sum() / num_pairs, _measured(loss_B, config.beta * log_ratio_B2)


def score_objective(*, scores: Tensor, margins: Tensor, num_pairs: int) -> tuple[Tensor, dict[str, Metric]]:
    """Bradley-Terry on B pairs of a step of `num_pairs`: scores (B, 2), margins (B,)."""
    loss_B = bradley_terry(scores[:, 0], scores[:, 1], margins)
    return loss_B.sum() / num_pairs, _measured(loss_B, scores)


def _measured(loss_B: Tensor, rewards_B2: Tensor) -> dict[str, Metric]:
    rewards, size = rewards_B2.detach().double(), len(loss_B)
    margins_B = rewards[:, 0] - rewards[:, 1]
    right_B = (margins_B > 0) + 0.5 * (margins_B == 0)
    sums = torch.stack([loss_B.detach().sum().double(), *rewards.sum(0), margins_B.sum(), right_B.sum()]).tolist()
    return {one.name: Mean(total, size) for one, total in zip(METRICS, sums, strict=True)}
