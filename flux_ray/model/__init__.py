"""Policy and score models: loading, packed forward to log-probs or scores, saving. No ray, no vllm, no deepspeed."""

from flux_ray.model.load import (
    check_score_model,
    context_length,
    load_policy,
    load_score,
    load_tokenizer,
    resolve_dtype,
    skeleton,
    slow_dtype,
)
from flux_ray.model.lora import Adapter, adapt, check_targets
from flux_ray.model.packed import PackedModel
from flux_ray.model.policy import PolicyModel
from flux_ray.model.save import atomic_folder, save_model
from flux_ray.model.score import ScoreModel, last_token, padding_token

__all__ = [
    "Adapter", "PackedModel", "PolicyModel", "ScoreModel", "adapt", "atomic_folder", "check_score_model",
    "check_targets", "context_length", "last_token", "load_policy", "load_score", "load_tokenizer", "padding_token",
    "resolve_dtype", "save_model", "skeleton", "slow_dtype",
]
