"""Attention for training on GPUs: many sequences in one row, each sees itself alone, no token is padding.

Takes:  queries, keys and values of one row, and where its sequences begin, as transformers' attention interface gives
        them.
Gives:  causal attention by torch's own flash kernels, forward and backward; by name for `set_attn_implementation`.
Knows:  what these kernels can: bf16 or fp16, GPUs from Ampere on, heads of up to 256 in eights, sliding windows; no cap
        on the scores and no sinks.
Never:  needs a package beside torch: flash-attn must be built where it is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

TORCH_VARLEN = "torch_varlen"
LEAST_CAPABILITY = (8, 0)  # Ampere
MOST_HEAD_DIM, HEAD_DIM_STEP = 256, 8
UNABLE = {"attn_logit_softcapping": "a cap on its attention's scores"}  # of a model's config ► in words


def why_not(dtype: torch.dtype) -> str | None:
    """What this machine, or the type, lacks; None where the kernels can run."""
    if not torch.cuda.is_available():
        return "no GPU here"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    return None if dtype in (torch.bfloat16, torch.float16) else f"{str(dtype).removeprefix('torch.')} weights"


def why_not_this(config: Any) -> str | None:
    """What a model has that the kernels can't do, from its text config; None where they can."""
    for name, words in UNABLE.items():
        if getattr(config, name, None):
            return words
    heads = getattr(config, "num_attention_heads", None)
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if not head_dim or head_dim > MOST_HEAD_DIM or head_dim % HEAD_DIM_STEP:
        return f"heads of {head_dim}"
    return None


def torch_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: (1, N, T, D) queries, (1, K, T, D) keys and values ► (1, T, N, D).

    `more` has cu_seq_lens_q (int32, on the GPU; B + 1 borders of the sequences) and max_length_q (tokens of the
    longest); scaling and sliding_window where the model has them. NotImplementedError for sinks, a cap, dropout or a
    mask.
    """
    from torch.nn.attention.varlen import varlen_attn

    asked = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    asked += ["dropout"] * bool(more.get("dropout"))
    if asked or attention_mask is not None:
        raise NotImplementedError(f"model.attention={TORCH_VARLEN} with {', '.join(asked) or 'a mask'}")
    window = more.get("sliding_window")
    borders, longest = more["cu_seq_lens_q"], more["max_length_q"]
    query_TND, key_TKD, value_TKD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output_TND = varlen_attn(
        query_TND, key_TKD, value_TKD, borders, borders, longest, longest, scale=more.get("scaling"),
        window_size=(window - 1 if window else -1, 0), enable_gqa=query.shape[1] != key.shape[1])
    return output_TND[None], None


def no_mask(*_: Any, **__: Any) -> None:
    """The borders say all that a mask would."""


AttentionInterface.register(TORCH_VARLEN, torch_varlen)
AttentionMaskInterface.register(TORCH_VARLEN, no_mask)
