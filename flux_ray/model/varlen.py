"""Attention for training on GPUs: many sequences in one row, each sees itself alone, no token is padding.

Takes:  queries, keys and values of one row, and where its sequences begin, as transformers' attention interface gives
        them.
Gives:  causal attention by torch's own flash kernels, forward and backward; by name for `set_attn_implementation`.
Knows:  what these kernels can: bf16 or fp16, NVIDIA GPUs from Ampere on, heads of up to 256 in eights, values as wide
        as queries, sliding windows; no cap on the scores, no sinks, no mask or bias of a model's own.
Never:  needs a package beside torch: flash-attn must be built where it is installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from flux_ray.model.traits import WORDS

TORCH_VARLEN = "torch_varlen"
LEAST_CAPABILITY = (8, 0)  # Ampere
MOST_HEAD_DIM, HEAD_DIM_STEP = 256, 8
CHUNKED = "attention_chunk_size"  # of a model's config: transformers puts it into the mask alone, and here is no mask


def why_not(dtype: torch.dtype) -> str | None:
    """What this machine, or the type, lacks; None where the kernels can run."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "no NVIDIA GPU here"
    if torch.cuda.get_device_capability() < LEAST_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than Ampere"
    return None if dtype in (torch.bfloat16, torch.float16) else f"{str(dtype).removeprefix('torch.')} weights"


def borders_of(lengths_B: Tensor, device: torch.device) -> dict[str, object]:
    """Where the sequences of one row begin and end, as arguments of a transformers model."""
    bounds = nn.functional.pad(lengths_B.cumsum(0), (1, 0)).to(device, torch.int32)
    longest = int(lengths_B.max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def torch_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: (1, N, T, D) queries, (1, K, T, D) keys and values ► (1, T, N, D).

    `more` has what `borders_of` gives; scaling and sliding_window where the model has them. On a CPU, where a model is
    tried before it goes to its GPU, by the formula. NotImplementedError for what the kernels don't have.
    """
    from torch.nn.attention.varlen import varlen_attn

    asked = [words for name, words in WORDS.items() if more.get(name) is not None]
    asked += ["dropout"] * bool(more.get("dropout"))
    asked += ["a mask of its own"] * (attention_mask is not None)
    asked += ["attention to later tokens"] * (more.get("is_causal") is False)
    asked += ["attention that isn't told where sequences begin"] * ("cu_seq_lens_q" not in more)
    head_dim = query.shape[-1]
    if head_dim > MOST_HEAD_DIM or head_dim % HEAD_DIM_STEP or value.shape[-1] != head_dim:
        asked.append(f"heads of {head_dim} and values of {value.shape[-1]}")
    if asked:
        raise NotImplementedError(" and ".join(asked))
    window = (more.get("sliding_window") or 0) - 1  # keys that a token sees before its own; -1: all
    borders, longest = more["cu_seq_lens_q"], more["max_length_q"]
    query_TND, key_TKD, value_TKD = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = more.get("scaling")
    if not query.is_cuda:
        return by_the_formula(query_TND, key_TKD, value_TKD, borders, scale=scale, window=window)[None], None
    output_TND = varlen_attn(query_TND, key_TKD, value_TKD, borders, borders, longest, longest, scale=scale,
                             window_size=(window, 0), enable_gqa=query.shape[1] != key.shape[1])
    return output_TND[None], None


def by_the_formula(
    query_TND: Tensor, key_TKD: Tensor, value_TKD: Tensor, borders: Tensor, *, scale: float | None, window: int,
) -> Tensor:
    """What varlen_attn computes with window_size=(window, 0), sequence after sequence, in fp32."""
    shared, outputs = query_TND.shape[1] // key_TKD.shape[1], []
    for start, stop in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        q, k, v = (rows[start:stop].transpose(0, 1).float() for rows in (query_TND, key_TKD, value_TKD))
        back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = (back >= 0) & ((back <= window) if window >= 0 else True)
        scores = q @ k.repeat_interleave(shared, 0).transpose(1, 2) * (scale or query_TND.shape[-1] ** -0.5)
        probs = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append((probs @ v.repeat_interleave(shared, 0)).transpose(0, 1))
    return torch.cat(outputs).to(query_TND.dtype)


def no_mask(*_: object, **__: object) -> None:
    """The borders say all that a mask would."""


AttentionInterface.register(TORCH_VARLEN, torch_varlen)
AttentionMaskInterface.register(TORCH_VARLEN, no_mask)
