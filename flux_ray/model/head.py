"""The LM head that gives log-probs and entropy instead of logits.

Takes:  hidden states, the rows to predict from, the tokens to predict, a temperature.
Gives:  log p and entropy per predicted token, in fp32, differentiable; in place of nn.Linear (`put_in_place`).
Knows:  chunks: at most two fp32 blocks of chunk x vocabulary are alive at once, in forward and in backward.
Keeps:  of a forward only hidden states, logsumexp and entropy; backward makes each chunk's logits again.
Never:  gathers a weight: it runs as the head module's own forward, so ZeRO-3's hooks bring the weight both times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Chunking:
    """How a head's pass is done: logits are multiplied by `scale` (1/temperature and the model's own factor)."""

    scale: float
    chunk_tokens: int
    with_entropy: bool


def _logits(rows_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float) -> Tensor:
    """fp32 logits of one chunk; the product itself is in the weights' type, as an engine does it."""
    logits_CV = nn.functional.linear(rows_CH, weight_VH, bias_V).float()
    return logits_CV.mul_(scale) if scale != 1.0 else logits_CV


class _ChunkedLogprobs(torch.autograd.Function):
    """log p(target) and entropy of softmax(scale * (h W^T + b)), row by row, chunk by chunk.

    With z the scaled logits, p their softmax and H its entropy:
    d log p_y / dz = 1[y] - p,  d H / dz = -p * (log p + H).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, rows_N: Tensor, targets_N: Tensor,
        how: Chunking,
    ) -> Tensor:
        result_2N = torch.zeros(2, len(rows_N), dtype=torch.float32, device=hidden_RH.device)
        logprobs_N, entropy_N = result_2N
        normalizer_N = torch.empty_like(logprobs_N)
        for start in range(0, len(rows_N), how.chunk_tokens):
            chunk = slice(start, start + how.chunk_tokens)
            logits_CV = _logits(hidden_RH[rows_N[chunk]], weight_VH, bias_V, how.scale)
            normalizer_C = torch.logsumexp(logits_CV, dim=-1)
            normalizer_N[chunk] = normalizer_C
            logprobs_N[chunk] = logits_CV.gather(1, targets_N[chunk, None])[:, 0] - normalizer_C
            if how.with_entropy:
                logits_CV -= normalizer_C[:, None]
                probs_CV = logits_CV.exp()
                entropy_N[chunk] = -probs_CV.mul_(logits_CV).sum(-1)
                del probs_CV
            del logits_CV  # before the next chunk's are made
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, rows_N, targets_N, normalizer_N, entropy_N.clone())
        ctx.how = how
        return result_2N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs_N, grad_entropy_N = grads[0]
        through_entropy = bool(grad_entropy_N.any())  # not where the entropy is only measured
        hidden_RH, weight_VH, bias_V, rows_N, targets_N, normalizer_N, entropy_N = ctx.saved_tensors
        how: Chunking = ctx.how
        grad_hidden_RH = torch.zeros_like(hidden_RH)
        grad_weight_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V) if bias_V is not None else None
        for start in range(0, len(rows_N), how.chunk_tokens):
            chunk = slice(start, start + how.chunk_tokens)
            rows_CH = hidden_RH[rows_N[chunk]]
            grad_CV = _logits(rows_CH, weight_VH, bias_V, how.scale).sub_(normalizer_N[chunk, None])
            probs_CV = grad_CV.exp()
            if through_entropy:
                grad_CV.add_(entropy_N[chunk, None]).mul_(probs_CV).mul_(-grad_entropy_N[chunk, None])
            else:
                grad_CV.zero_()
            grad_CV.sub_(probs_CV.mul_(grad_logprobs_N[chunk, None]))
            del probs_CV
            grad_CV.scatter_add_(1, targets_N[chunk, None], grad_logprobs_N[chunk, None])
            grad_CV = grad_CV.mul_(how.scale).to(weight_VH.dtype)
            # A row is the predecessor of one target only, so a plain write would do; index_add needs no such promise.
            grad_hidden_RH.index_add_(0, rows_N[chunk], grad_CV @ weight_VH)
            if grad_weight_VH is not None:
                grad_weight_VH.addmm_(grad_CV.t(), rows_CH)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            del grad_CV, rows_CH
        return grad_hidden_RH, grad_weight_VH, grad_bias_V, None, None, None


class LogprobHead(nn.Linear):
    """A model's own lm_head (same parameters, same names) whose forward gives log-probs of given tokens."""

    logit_scale: float = 1.0
    chunk_tokens: int = 1024

    def forward(  # type: ignore[override]
        self, hidden_RH: Tensor, rows_N: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool,
    ) -> Tensor:
        """(2, N) fp32: log-probs of `targets_N` predicted from `hidden_RH[rows_N]`, and entropies (zeros if unasked).

        One tensor, so that ZeRO-3 sees one output of this module whether or not the loss uses the entropy.
        """
        how = Chunking(self.logit_scale / temperature, self.chunk_tokens, with_entropy)
        return _ChunkedLogprobs.apply(hidden_RH, self.weight, self.bias, rows_N, targets_N, how)


def put_in_place(head: nn.Linear, *, logit_scale: float, chunk_tokens: int) -> LogprobHead:
    """Turn this very module into a LogprobHead: parameters, ties and names stay as they are."""
    head.__class__ = LogprobHead
    assert isinstance(head, LogprobHead)
    head.logit_scale = logit_scale
    head.chunk_tokens = chunk_tokens
    return head
