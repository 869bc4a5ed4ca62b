"""Functions that were registered in a notebook's cell, for the processes of a run.

Takes:  a config that names registered rewards and a registered rollout.
Gives:  `as_given`: the config with those that have no file as functions handed over.
Knows:  the names in metrics and options stay what they were registered by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flux_ray import config as configs
from flux_ray.config import Config, PolicyGradientConfig
from flux_ray.errors import UserError
from flux_ray.plugins import HANDED_OVER, hand_over
from flux_ray.reward import get_reward, list_rewards
from flux_ray.rollout.functions import get_rollout, list_rollouts

C = TypeVar("C", bound=Config)


def as_given(config: C, *, name_of: Callable[[Callable[..., Any]], str]) -> C:
    """`name_of`: the name by which another process imports a function; UserError where it has none."""
    if not isinstance(config, PolicyGradientConfig):
        return config

    def known(name: str, function: Callable[..., Any]) -> str:
        try:
            name_of(function)
        except UserError:
            return hand_over(function, name=f"{HANDED_OVER}{name}")
        return name

    rewards, rollout = config.reward.functions, config.rollout.function
    rules = {name for name in list_rewards() if get_reward(name).__module__.startswith("flux_ray.")}
    registered = set(list_rewards()) - rules
    return configs.changed(config, {
        "reward.functions": [known(name, get_reward(name)) if name in registered else name for name in rewards],
        "rollout.function": known(rollout, get_rollout(rollout)) if rollout in list_rollouts() else rollout,
    })
