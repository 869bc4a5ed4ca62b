"""RMSNorm for training on CPUs: a few rows at a time, so that what lies between stays in the cache.

Takes:  a transformers model.
Gives:  `put_in_place`: its RMSNorms, those that compute what ours does, compute it in ours.
Knows:  why: as written in transformers a norm moves its whole input through memory a dozen times, forward and
        backward, and that is what ranks on the cores of one machine share (docs/benchmarks.md).
Never:  changes what a forward gives, not by a bit: it is tried on each norm, and where it differs, left.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

BLOCK_NUMBERS = 1 << 17  # numbers alive at once: half a MiB in fp32, which stays in a core's second-level cache


class _BlockedRMSNorm(torch.autograd.Function):
    """w * x / rms(x) (Zhang & Sennrich 2019, equation 4), the quotient in fp32 and rounded to x's type before w.

    With y = x / rms(x), g the gradient and H the width: dx = (g w - y mean_H(g w y)) / rms(x), dw = sum over rows g y.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        hidden_RH = hidden.reshape(-1, hidden.shape[-1])
        output_RH = torch.empty_like(hidden_RH)
        inverse_R1 = torch.empty(len(hidden_RH), 1)
        for rows in _blocks(hidden_RH):
            x = hidden_RH[rows].float()
            inverse_R1[rows] = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
            torch.mul(weight_H, (x * inverse_R1[rows]).to(hidden.dtype), out=output_RH[rows])
        ctx.save_for_backward(hidden, weight_H, inverse_R1)
        return output_RH.view(hidden.shape)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight_H, inverse_R1 = ctx.saved_tensors
        hidden_RH, grad_RH = (t.reshape(-1, hidden.shape[-1]) for t in (hidden, grads[0]))
        grad_hidden_RH, grad_weight_H = torch.empty_like(hidden_RH), torch.zeros(hidden.shape[-1])
        for rows in _blocks(hidden_RH):
            inverse, grad = inverse_R1[rows], grad_RH[rows].float()
            y = hidden_RH[rows].float() * inverse
            grad_weight_H += (grad * y).sum(0)
            grad_y = grad * weight_H
            mean = (grad_y * y).mean(-1, keepdim=True)
            grad_hidden_RH[rows] = grad_y.sub_(y.mul_(mean)).mul_(inverse)
        return grad_hidden_RH.view(hidden.shape), grad_weight_H.to(weight_H.dtype), None


class BlockedRMSNorm(nn.Module):
    """The forward of an RMSNorm as transformers has it: a parameter `weight`, a number `variance_epsilon`."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Tensor) -> Tensor:
        return _BlockedRMSNorm.apply(hidden, self.weight, self.variance_epsilon)


def put_in_place(model: nn.Module) -> int:
    """Turn these very modules into BlockedRMSNorm, where that changes nothing they give. Gives how many."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    chosen = [module for module in norms if _gives_the_same(module)]  # each: two of one class may be made differently
    for module in chosen:
        module.__class__ = BlockedRMSNorm
    return len(chosen)


def _gives_the_same(norm: nn.Module) -> bool:
    """Whether `norm` is w * x / rms(x), rounded where ours is: tried with weights that are not the 1 they start as."""
    weight_H, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(weight_H, nn.Parameter) or eps is None or len([*norm.parameters(), *norm.buffers()]) != 1:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 3, len(weight_H), generator=generator).to(weight_H.dtype)
    other_H = torch.randn(len(weight_H), generator=generator).to(weight_H.dtype)
    with torch.no_grad():
        theirs = torch.func.functional_call(norm, {"weight": other_H}, (hidden,))
        return torch.equal(theirs, _BlockedRMSNorm.apply(hidden, other_H, eps))


def _blocks(rows_RH: Tensor) -> list[slice]:
    size = max(BLOCK_NUMBERS // rows_RH.shape[1], 1)
    return [slice(start, start + size) for start in range(0, len(rows_RH), size)]
