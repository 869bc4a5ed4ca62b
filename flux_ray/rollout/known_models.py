"""What vLLM must be told of some models so that it computes what transformers, and so the trainer, does.

Takes:  a model's config, the device.
Gives:  `engine_args_of`: options of vLLM; each with the reason, and the version of vLLM in which it was read.
Never:  changes what is saved: the trainer's config stays the model's own.
"""

from __future__ import annotations

from typing import Any

#: Kinds of layers that keep keys and values of tokens, as transformers' configs name them; others keep a state.
OF_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


def engine_args_of(model_path: str, device: str) -> dict[str, Any]:
    """Options for AsyncEngineArgs; empty for most models."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_path).get_text_config()
    args: dict[str, Any] = {}
    if config.model_type == "cohere2" and config.sliding_window:
        # vLLM 0.32's commandr.py lets a token see sliding_window + 1 tokens, transformers sliding_window.
        args["hf_overrides"] = {"sliding_window": config.sliding_window - 1}
    if device == "cpu" and has_state(config):
        # vLLM 0.32 keeps prefixes of layers with a state only where prefills are cut in chunks, which ours are not.
        args["enable_prefix_caching"] = False
    return args


def has_state(config: Any) -> bool:
    """Whether some layers keep a state instead of keys and values: convolutions, mamba, linear attention."""
    return bool(set(getattr(config, "layer_types", None) or []) - OF_ATTENTION)
