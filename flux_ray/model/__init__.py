"""Policy and score models: loading, packed forward to log-probs or scores, saving. No ray, no vllm, no deepspeed."""

from flux_ray.model.load import (
    check_score_model,
    context_length,
    load_policy,
    load_score,
    load_tokenizer,
    longest_context,
    policy_traits,
    resolve_dtype,
    score_traits,
    skeleton,
    slow_dtype,
    turns,
)
from flux_ray.model.lora import Adapter, adapt, check_targets
from flux_ray.model.packed import PackedModel
from flux_ray.model.policy import PolicyModel
from flux_ray.model.routing import check_routers
from flux_ray.model.save import atomic_folder, save_model
from flux_ray.model.score import ScoreModel, last_token, padding_token

__all__ = [
    "Adapter", "PackedModel", "PolicyModel", "ScoreModel", "adapt", "atomic_folder", "check_routers",
    "check_score_model", "check_targets", "context_length", "last_token", "load_policy", "load_score",
    "load_tokenizer", "longest_context", "padding_token", "policy_traits", "resolve_dtype", "save_model",
    "score_traits", "skeleton", "slow_dtype", "turns",
]
