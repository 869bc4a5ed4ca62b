"""Rewards: rules, the registry that a user's own functions join, and the worker that calls them."""

from flux_ray.reward.registry import (
    RewardFunction,
    answers_in,
    count_silent,
    find_answer_column,
    get_reward,
    list_rewards,
    register_reward,
    resolve_functions,
)
from flux_ray.reward.sandboxed import SandboxedRewards, Surroundings, ask_signatures
from flux_ray.reward.worker import RewardWorker

__all__ = [
    "RewardFunction", "RewardWorker", "SandboxedRewards", "Surroundings", "answers_in", "ask_signatures",
    "count_silent", "find_answer_column", "get_reward", "list_rewards", "register_reward", "resolve_functions",
]
