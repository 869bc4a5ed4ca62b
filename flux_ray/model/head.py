"""The LM head that gives log-probs and entropy instead of logits.

Takes:  hidden states, the rows to predict from, the tokens to predict, a temperature.
Gives:  log p and entropy per predicted token, in fp32, differentiable; in place of nn.Linear (`put_in_place`).
Knows:  chunks: at most two fp32 blocks of chunk x vocabulary are alive at once, in forward and in backward; on a GPU
        what is done with a chunk's logits is compiled: it goes over them two or three times, not ten.
Keeps:  of a forward only hidden states, logsumexp and entropy; backward makes each chunk's logits again.
Never:  gathers a weight: it runs as the head module's own forward, so ZeRO-3's hooks bring the weight both times.
"""

from __future__ import annotations

import functools
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


@dataclass(frozen=True)
class HeadForm:
    """A model's logits as a function of z = lm_head(hidden): scale · z, or cap · tanh(scale · z / cap)."""

    scale: float = 1.0
    cap: float | None = None


@dataclass(frozen=True)
class Chunking:
    """How a head's pass is done.

    z = scale · lm_head(h), with 1/temperature and the model's own factor in it; with a cap, cap · tanh(z / cap), with
    1/temperature in the cap too.
    """

    scale: float
    cap: float | None
    chunk_tokens: int
    with_entropy: bool


def _product(rows_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits of one chunk in the weights' type, as an engine makes them; all that follows is fp32."""
    return nn.functional.linear(rows_CH, weight_VH, bias_V)


def _scaled(logits_CV: Tensor, scale: float, cap: float | None) -> Tensor:
    """z in fp32, in the logits' own memory where they are fp32."""
    logits_CV = logits_CV.float()
    logits_CV = logits_CV.mul_(scale) if scale != 1.0 else logits_CV
    return logits_CV if cap is None else logits_CV.div_(cap).tanh_().mul_(cap)


def measure(
    logits_CV: Tensor, targets_C: Tensor, scale: float, with_entropy: bool, cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, logsumexp, entropy) of a chunk, (C,) fp32 each. Takes the logits for itself."""
    logits_CV = _scaled(logits_CV, scale, cap)
    normalizer_C = torch.logsumexp(logits_CV, dim=-1)
    logprobs_C = logits_CV.gather(1, targets_C[:, None])[:, 0] - normalizer_C
    if not with_entropy:
        return logprobs_C, normalizer_C, torch.zeros_like(normalizer_C)
    logits_CV -= normalizer_C[:, None]
    return logprobs_C, normalizer_C, -logits_CV.exp().mul_(logits_CV).sum(-1)


def differentiate(
    logits_CV: Tensor, targets_C: Tensor, measured: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor | None],
    scale: float, cap: float | None = None,
) -> Tensor:
    """Gradient by the product of a chunk (C, V), in its type. Takes the logits for itself.

    measured: logsumexp and entropy; grads: by log-probs and by entropy, None where that is only measured; (C,) each.
    """
    (normalizer_C, entropy_C), (grad_logprobs_C, grad_entropy_C) = measured, grads
    dtype, logits_CV = logits_CV.dtype, _scaled(logits_CV, scale, cap)
    slope_CV = None if cap is None else 1 - (logits_CV / cap).square_()  # of z by what the cap is put on
    grad_CV = logits_CV.sub_(normalizer_C[:, None])
    probs_CV = grad_CV.exp()
    if grad_entropy_C is not None:
        grad_CV.add_(entropy_C[:, None]).mul_(probs_CV).mul_(-grad_entropy_C[:, None])
    else:
        grad_CV.zero_()
    grad_CV.sub_(probs_CV.mul_(grad_logprobs_C[:, None]))
    del probs_CV
    grad_CV.scatter_add_(1, targets_C[:, None], grad_logprobs_C[:, None])
    grad_CV = grad_CV if slope_CV is None else grad_CV.mul_(slope_CV)
    return grad_CV.mul_(scale).to(dtype)


def _fused_scaled(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    logits = logits.float() * scale
    return logits if cap is None else cap * torch.tanh(logits / cap)


def fused_measure(
    logits_CV: Tensor, targets_C: Tensor, scale: float, with_entropy: bool, cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `measure`, without a block of its own for a compiler to write."""
    scaled_CV = _fused_scaled(logits_CV, scale, cap)
    normalizer_C = torch.logsumexp(scaled_CV, dim=-1)
    target_C = _fused_scaled(logits_CV.gather(1, targets_C[:, None])[:, 0], scale, cap)
    if not with_entropy:
        return target_C - normalizer_C, normalizer_C, torch.zeros_like(normalizer_C)
    centred_CV = scaled_CV - normalizer_C[:, None]
    return target_C - normalizer_C, normalizer_C, -(centred_CV.exp() * centred_CV).sum(-1)


def fused_differentiate(
    logits_CV: Tensor, targets_C: Tensor, measured: tuple[Tensor, Tensor], grads: tuple[Tensor, Tensor | None],
    scale: float, cap: float | None = None,
) -> Tensor:
    """As `differentiate`: a compiler reads each logit once and writes its gradient once."""
    (normalizer_C, entropy_C), (grad_logprobs_C, grad_entropy_C) = measured, grads
    scaled_CV = _fused_scaled(logits_CV, scale, cap)
    centred_CV = scaled_CV - normalizer_C[:, None]
    probs_CV = centred_CV.exp()
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C[:, None]
    grad_CV = (is_target_CV.float() - probs_CV) * grad_logprobs_C[:, None]
    if grad_entropy_C is not None:
        grad_CV = grad_CV - probs_CV * (centred_CV + entropy_C[:, None]) * grad_entropy_C[:, None]
    if cap is not None:
        grad_CV = grad_CV * (1 - (scaled_CV / cap).square())
    return (grad_CV * scale).to(logits_CV.dtype)


#: (measure, differentiate), as they are or compiled.
Passes = tuple[Callable[..., tuple[Tensor, Tensor, Tensor]], Callable[..., Tensor]]


def _passes(chunk: Tensor) -> Passes:
    """(measure, differentiate) for a chunk. One row alone isn't compiled for: the compiler would make a program for
    that size, beside the one for the first size and the one for all others."""
    return _compiled() if chunk.is_cuda and len(chunk) > 1 else (measure, differentiate)


@functools.cache
def _compiled() -> Passes:
    """(measure, differentiate) in few passes over the logits, where there is what Triton builds its launchers with."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if not headers.exists() or not any(shutil.which(name) for name in compilers):
        return measure, differentiate
    return torch.compile(fused_measure), torch.compile(fused_differentiate)


class _ChunkedLogprobs(torch.autograd.Function):
    """log p(target) and entropy of softmax(scale * (h W^T + b)), row by row, chunk by chunk.

    With z the scaled logits, p their softmax and H its entropy:
    d log p_y / dz = 1[y] - p,  d H / dz = -p * (log p + H).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, rows_N: Tensor,
        targets_N: Tensor, how: Chunking,
    ) -> Tensor:
        result_2N = torch.zeros(2, len(rows_N), dtype=torch.float32, device=hidden_RH.device)
        normalizer_N = torch.empty_like(result_2N[0])
        for start in range(0, len(rows_N), how.chunk_tokens):
            chunk = slice(start, start + how.chunk_tokens)
            measured, _ = _passes(rows_N[chunk])
            result_2N[0, chunk], normalizer_N[chunk], result_2N[1, chunk] = measured(
                _product(hidden_RH[rows_N[chunk]], weight_VH, bias_V), targets_N[chunk], how.scale, how.with_entropy,
                how.cap)
        ctx.save_for_backward(hidden_RH, weight_VH, bias_V, rows_N, targets_N, normalizer_N, result_2N[1].clone())
        ctx.how = how
        return result_2N

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
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
            _, differentiated = _passes(rows_CH)
            grad_CV = differentiated(
                _product(rows_CH, weight_VH, bias_V), targets_N[chunk], (normalizer_N[chunk], entropy_N[chunk]),
                (grad_logprobs_N[chunk], grad_entropy_N[chunk] if through_entropy else None), how.scale, how.cap)
            # A row is the predecessor of one target only, so a plain write would do; index_add needs no such promise.
            grad_hidden_RH.index_add_(0, rows_N[chunk], grad_CV @ weight_VH)
            if grad_weight_VH is not None:
                grad_weight_VH.addmm_(grad_CV.t(), rows_CH)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(0)
            del grad_CV, rows_CH  # before the next chunk's are made
        return grad_hidden_RH, grad_weight_VH, grad_bias_V, None, None, None


class LogprobHead(nn.Linear):
    """A model's own lm_head (same parameters, same names) whose forward gives log-probs of given tokens."""

    form: HeadForm = HeadForm()
    chunk_tokens: int = 1024

    def forward(  # type: ignore[override]
        self, hidden_RH: Tensor, rows_N: Tensor, targets_N: Tensor, temperature: float, with_entropy: bool,
    ) -> Tensor:
        """(2, N) fp32: log-probs of `targets_N` predicted from `hidden_RH[rows_N]`, and entropies (zeros if unasked).

        One tensor, so that ZeRO-3 sees one output of this module whether or not the loss uses the entropy.
        """
        cap = None if self.form.cap is None else self.form.cap / temperature
        how = Chunking(self.form.scale / temperature, cap, self.chunk_tokens, with_entropy)
        return _ChunkedLogprobs.apply(hidden_RH, self.weight, self.bias, rows_N, targets_N, how)


def put_in_place(head: nn.Linear, *, chunk_tokens: int, form: HeadForm = HeadForm()) -> LogprobHead:
    """Turn this very module into a LogprobHead: parameters, ties and names stay as they are."""
    head.__class__ = LogprobHead
    assert isinstance(head, LogprobHead)
    head.form = form
    head.chunk_tokens = chunk_tokens
    return head
