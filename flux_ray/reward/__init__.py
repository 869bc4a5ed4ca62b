"""Rewards: rules, the registry that a user's own functions join, and the worker that calls them."""

from flux_ray.reward.registry import get_reward, list_rewards, register_reward, resolve_functions
from flux_ray.reward.worker import RewardWorker

__all__ = ["RewardWorker", "get_reward", "list_rewards", "register_reward", "resolve_functions"]
