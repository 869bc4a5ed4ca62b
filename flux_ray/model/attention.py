"""Attention for training on CPUs: causal, in blocks of rows whose scores stay in the cache.

Takes:  queries, keys and values of rows padded at their right, as transformers' attention interface gives them.
Gives:  what torch's scaled_dot_product_attention gives, forward and backward; by name for `set_attn_implementation`.
Knows:  why: torch's kernel for CPUs goes through all T x T scores of short rows, and in bf16 its backward is slow
        (docs/benchmarks.md has the times of both).
Keeps:  the probabilities at or below the diagonal, for backward; so long rows, and rows with a mask, go to torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CAUSAL_BLOCKS = "causal_blocks"
BLOCK_ROWS = 128  # rows of scores made at once
BLOCK_SCORES = 1 << 18  # scores alive at once: a MiB in fp32, which stays in a core's second-level cache
LONGEST = 1024  # tokens of a row; beyond it torch is about as fast, and the probabilities kept would outgrow the rest
SHORTEST = {torch.bfloat16: 1, torch.float32: BLOCK_ROWS + 1}  # in fp32 torch is as fast on rows of a single block


class _CausalBlocks(torch.autograd.Function):
    """softmax(scale * Q K^T + causal mask) V. Axes: B rows, N query heads, K key heads, T tokens, D head.

    Scores, their softmax and its gradient are fp32; what is multiplied with values, keys and queries has their type.
    With P the probabilities and O the output: dS = P * (dO V^T - sum(dO * O)), dQ = scale dS K, dK = scale dS^T Q,
    dV = P^T dO (Dao et al. 2022, FlashAttention, appendix B.2).
    """

    @staticmethod
    def forward(ctx: FunctionCtx, query_BNTD: Tensor, key_BKTD: Tensor, value_BKTD: Tensor, scale: float) -> Tensor:
        output_BNTD = _like(query_BNTD)
        kept = []
        for rows, blocks in _blocks(query_BNTD):
            keys_t, values = _by_head(key_BKTD[rows]).float().transpose(1, 2), _by_head(value_BKTD[rows])
            for block in blocks:
                queries = _queries(query_BNTD[rows], block, key_BKTD)
                scores = (queries.float() * scale) @ keys_t[:, :, : block.stop]
                _hide_later(scores, block)
                probs = scores.softmax(-1).to(values.dtype)
                output_BNTD[rows, :, block] = (probs @ values[:, : block.stop]).view_as(output_BNTD[rows, :, block])
                if any(ctx.needs_input_grad):
                    kept.append(probs)
        ctx.scale = scale
        ctx.save_for_backward(query_BNTD, key_BKTD, value_BKTD, output_BNTD, *kept)
        return output_BNTD

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query_BNTD, key_BKTD, value_BKTD, output_BNTD, *kept = ctx.saved_tensors
        (dO_BNTD,) = grads
        dQ_BNTD, dK_BKTD, dV_BKTD = _like(query_BNTD), _like(key_BKTD), _like(value_BKTD)
        probs_of = iter(kept)
        for rows, blocks in _blocks(query_BNTD):
            keys, values_t = _by_head(key_BKTD[rows]), _by_head(value_BKTD[rows]).float().transpose(1, 2)
            dK, dV = torch.zeros(keys.shape), torch.zeros(keys.shape)
            for block in blocks:
                seen, probs = slice(0, block.stop), next(probs_of)
                queries, dO, output = (_queries(t[rows], block, key_BKTD) for t in (query_BNTD, dO_BNTD, output_BNTD))
                shift = (dO.float() * output.float()).sum(-1, keepdim=True)
                dS = dO.float() @ values_t[:, :, seen]
                dS = dS.sub_(shift).mul_(probs).mul_(ctx.scale).to(keys.dtype)
                dQ_BNTD[rows, :, block] = (dS @ keys[:, seen]).view_as(dQ_BNTD[rows, :, block])
                dK[:, seen] += dS.transpose(1, 2) @ queries
                dV[:, seen] += probs.transpose(1, 2) @ dO
            dK_BKTD[rows], dV_BKTD[rows] = dK.view_as(dK_BKTD[rows]), dV.view_as(dV_BKTD[rows])
        return dQ_BNTD, dK_BKTD, dV_BKTD, None


def causal_blocks(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: (B, N, T, D) queries, (B, K, T, D) keys and values ► (B, T, N, D).

    Anything but plain causal attention of whole rows, of `SHORTEST` to `LONGEST` tokens, is left to torch.
    """
    causal = more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    plain = causal and attention_mask is None and more.get("position_bias") is None and not more.get("dropout")
    alike = query.shape[2] == key.shape[2] and key.shape == value.shape
    if not plain or not alike or not SHORTEST.get(query.dtype, LONGEST + 1) <= query.shape[2] <= LONGEST:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    scaling = more.get("scaling")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _CausalBlocks.apply(query, key, value, scale).transpose(1, 2), None


AttentionInterface.register(CAUSAL_BLOCKS, causal_blocks)
AttentionMaskInterface.register(CAUSAL_BLOCKS, sdpa_mask)  # no mask where it is causal alone


def _blocks(query_BNTD: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """(rows, blocks of tokens within them), so that the scores of one block are about `BLOCK_SCORES`."""
    num_rows, num_heads, num_tokens, _ = query_BNTD.shape
    num_blocks = max(round(num_tokens / BLOCK_ROWS), 1)
    size = -(-num_tokens // num_blocks)
    blocks = [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]
    step = max(BLOCK_SCORES // (num_heads * size * num_tokens), 1)
    for start in range(0, num_rows, step):
        yield slice(start, start + step), blocks


def _like(tensor_BNTD: Tensor) -> Tensor:
    """Room of the same shape, laid out as (B, T, N, D), which is what the layers before and after work with."""
    num_rows, num_heads, num_tokens, head_dim = tensor_BNTD.shape
    return tensor_BNTD.new_empty(num_rows, num_tokens, num_heads, head_dim).transpose(1, 2)


def _by_head(tensor_BKTD: Tensor) -> Tensor:
    """(B, K, T, D) ► (B * K, T, D)"""
    return tensor_BKTD.flatten(0, 1)


def _queries(tensor_BNTD: Tensor, block: slice, key_BKTD: Tensor) -> Tensor:
    """A block's rows, those of all N / K heads that share a key head below one another: (B * K, N / K * rows, D)."""
    num_key_heads, head_dim = key_BKTD.shape[1], key_BKTD.shape[3]
    return tensor_BNTD[:, :, block].reshape(len(tensor_BNTD) * num_key_heads, -1, head_dim)


def _hide_later(scores: Tensor, block: slice) -> None:
    """-inf where a key comes after its query; only the block on the diagonal has such."""
    size = block.stop - block.start
    later = torch.full((size, size), float("-inf")).triu_(1)
    scores.view(len(scores), -1, size, block.stop)[..., block.start :] += later
