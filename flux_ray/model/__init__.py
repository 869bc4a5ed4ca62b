"""The policy network: loading, packed forward to log-probs and entropy, saving. No ray, no vllm, no deepspeed."""

from flux_ray.model.load import context_length, load_policy, load_tokenizer, resolve_dtype
from flux_ray.model.policy import PolicyModel
from flux_ray.model.save import atomic_folder, save_model

__all__ = [
    "PolicyModel", "atomic_folder", "context_length", "load_policy", "load_tokenizer", "resolve_dtype", "save_model",
]
