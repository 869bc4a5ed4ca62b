"""Tries a user's registered estimator and loss on a small made batch, so that their faults show at start.

Takes:  a Config whose plugins are loaded.
Gives:  a UserError where one raises, or gives a wrong shape or nan; it names the function.
Never:  tries our own functions.
"""

from __future__ import annotations

import torch

from flux_ray.algo.advantages import compute_advantages
from flux_ray.algo.algorithms import Algorithm, estimator_config, needs_old_logprobs, needs_reference, resolve
from flux_ray.algo.estimators import find_adv_estimator
from flux_ray.algo.losses import find_policy_loss
from flux_ray.algo.objective import policy_objective
from flux_ray.config import Config, PolicyGradientConfig
from flux_ray.errors import UserError

NUM_GROUPS, LENGTH = 2, 4


def try_registered(config: Config) -> None:
    """UserError where a registered function fails at what every step asks of it."""
    if not isinstance(config, PolicyGradientConfig):
        return
    algorithm = resolve(config.algo)
    if find_adv_estimator(algorithm.estimator).ours and find_policy_loss(algorithm.policy_loss).ours:
        return
    what = f"advantage estimator {algorithm.estimator!r}"
    try:
        advantages = _advantages(config, algorithm)
        what = f"policy loss {algorithm.policy_loss!r}"
        _loss(config, algorithm, advantages)
    except UserError:
        raise
    except Exception as error:  # a user's code may raise anything
        rows = f"{NUM_GROUPS * config.rollout.group_size} x {LENGTH}"
        raise UserError(f"{what} failed on a made batch of {rows}: {type(error).__name__}: {error}") from error


def _made(config: PolicyGradientConfig) -> dict[str, torch.Tensor]:
    """Groups of rows of 1 to LENGTH loss tokens, log-probs near -1, rewards that differ."""
    rng = torch.Generator().manual_seed(0)
    num_rows = NUM_GROUPS * config.rollout.group_size
    lengths_N1 = torch.randint(1, LENGTH + 1, (num_rows, 1), generator=rng)
    noise = 0.1 * torch.randn(4, num_rows, LENGTH, generator=rng)
    rewards_N1 = torch.rand(num_rows, 1, generator=rng)
    return {
        "mask": torch.arange(LENGTH) < lengths_N1, "old": noise[0] - 1, "new": noise[1] - 1, "reference": noise[2] - 1,
        "values": noise[3], "rewards": torch.zeros(num_rows, LENGTH).scatter(1, lengths_N1 - 1, rewards_N1),
        "index": torch.arange(num_rows) // config.rollout.group_size,
    }


def _advantages(config: PolicyGradientConfig, algorithm: Algorithm) -> torch.Tensor:
    made = _made(config)
    needs_values = find_adv_estimator(algorithm.estimator).needs_values
    advantages, _ = compute_advantages(
        algorithm, token_level_rewards=made["rewards"], response_mask=made["mask"], index=made["index"],
        config=estimator_config(config), group_size=config.rollout.group_size,
        old_logprobs=made["old"] if needs_old_logprobs(config.algo) else None,
        reference_logprobs=made["reference"] if needs_reference(config.algo) else None,
        values=made["values"] if needs_values else None)
    return advantages


def _loss(config: PolicyGradientConfig, algorithm: Algorithm, advantages: torch.Tensor) -> None:
    made = _made(config)
    mask = made["mask"]
    loss, _ = policy_objective(
        algorithm, config.algo, log_prob=made["new"].requires_grad_(), old_log_prob=made["old"],
        sampler_log_prob=made["old"], reference_log_prob=made["reference"], entropy=torch.ones(mask.shape),
        advantages=advantages, response_mask=mask, loss_weights=mask / mask.sum())
    loss.backward()
