"""Refuses options that an engine can't have, before it starts.

Takes:  the options of the rollouts; what a model's config says of its shape.
Gives:  `check_engine_args`, `check_kv_cache`: a UserError that names the option; `check_installed`.
Knows:  which of vLLM's options we set ourselves, and what a sequence takes of the KV cache.
Never:  imports vLLM: that takes seconds, prints on the terminal and sets this process's environment.
"""

from __future__ import annotations

import importlib.metadata
import socket

from flux_ray.config import RolloutConfig
from flux_ray.config.libraries import fields, refuse_unknown, trees
from flux_ray.errors import UserError

ENTRY_POINT = "flux_ray_gloo"  # as pyproject.toml names it
#: Options of vLLM that decide whether engine and trainer agree, or that have a knob of ours: not to be set twice.
OWN_ENGINE_ARGS = {
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "seed": "seed",
    "max_model_len": "rollout.max_model_len",
    "max_num_seqs": "rollout.max_num_seqs",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "pipeline_parallel_size": "one engine is one tensor-parallel group: rollout.num_engines",
    "data_parallel_size": "one engine is one tensor-parallel group: rollout.num_engines",
    "kv_cache_memory_bytes": "rollout.kv_cache_gib on CPU, rollout.engine_args.gpu_memory_utilization on a GPU",
    "logprobs_mode": "always processed_logprobs",
    "generation_config": "always vllm",
    "weight_transfer_config": "weights.backend",
    "enable_return_routed_experts": "rollout.return_experts",
    "aux_output_config": "rollout.return_experts",
    "worker_extension_cls": "it compares the weights that come with those that were sent",
    "trust_remote_code": "never",
}


def check_engine_args(config: RolloutConfig) -> None:
    """Refuse, by name, options that we set ourselves and those that vLLM doesn't have."""
    for key in config.engine_args:
        if key in OWN_ENGINE_ARGS:
            raise UserError(f"rollout.engine_args.{key} can't be set there: {OWN_ENGINE_ARGS[key]}")
    if config.engine_args:
        known = fields(trees("vllm", "engine/arg_utils.py"), "EngineArgs", "AsyncEngineArgs")
        refuse_unknown(config.engine_args, known, option="rollout.engine_args", library="vLLM",
                       not_offered=OWN_ENGINE_ARGS)


def check_installed(entry_point: str = ENTRY_POINT) -> None:
    """UserError where flux_ray is on the path but not installed: vLLM's processes would not find the weight channel."""
    if not importlib.metadata.entry_points(group="vllm.general_plugins", name=entry_point):
        raise UserError(f"flux_ray isn't installed on {socket.gethostname()}, only on its path (as --working-dir puts "
                        "it): vLLM finds the weight transfer by an entry point. Install it there (pip, or our image)")


def check_kv_cache(model_path: str, *, context: int, dtype_bytes: int, kv_cache_gib: float) -> None:
    """UserError where the KV cache of an engine on CPU is smaller than one sequence of the whole context.

    Doesn't look at models that don't keep keys and values of every token in every layer: vLLM knows those.
    """
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(model_path).get_text_config()
    heads, layers = getattr(model, "num_attention_heads", None), getattr(model, "num_hidden_layers", None)
    kinds = set(getattr(model, "layer_types", None) or ["full_attention"])
    if not heads or not layers or kinds != {"full_attention"} or getattr(model, "kv_lora_rank", None):
        return
    head_dim = getattr(model, "head_dim", None) or model.hidden_size // heads
    kv_heads = getattr(model, "num_key_value_heads", None) or heads
    needed_gib = 2 * layers * kv_heads * head_dim * dtype_bytes * context / 2**30
    if needed_gib > kv_cache_gib:
        raise UserError(
            f"rollout.kv_cache_gib={kv_cache_gib:g} is less than one sequence takes: {needed_gib:.2f} GiB for "
            f"{context} tokens: those of rollout.max_model_len; where that isn't given, of the longest prompt and "
            "rollout.max_tokens, or the model's whole context for a rollout.function of your own"
        )
