"""Work on padded (N, L) tensors row by row, and values that bring their derivative along.

Takes:  tensors of N rows, a function of blocks of them.
Gives:  `by_rows`, `blocks`, which keep intermediate values in a CPU core's cache; `with_slope`.
Never:  knows what the numbers mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.autograd.function import FunctionCtx, once_differentiable

BLOCK_NUMBERS = 2**16  # numbers of a tensor in one block: half a megabyte in float64, which a core's cache holds


def by_rows(
    function: Callable[..., tuple[torch.Tensor, ...]], *tensors: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """function(*tensors), block by block of the tensors' rows; each result has a row for each row. No gradients."""
    results: tuple[torch.Tensor, ...] = ()
    start, num_rows = 0, len(tensors[0])
    with torch.no_grad():
        for parts in blocks(*tensors):
            made = function(*parts)
            if len(parts[0]) == num_rows:
                return made
            results = results or tuple(part.new_empty(num_rows, *part.shape[1:]) for part in made)
            for whole, part in zip(results, made, strict=True):
                whole[start : start + len(part)] = part
            start += len(parts[0])
    return results


def blocks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Blocks of the same rows of each tensor, small enough for the cache; on a GPU one block of all rows."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    on_cpu = tensors[0].device.type == "cpu"
    num_rows = max(BLOCK_NUMBERS // max(widest, 1) if on_cpu else len(tensors[0]), 1)
    return zip(*(tensor.split(num_rows) for tensor in tensors), strict=True)


def with_slope(by: torch.Tensor, *, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """`value`, whose derivative by `by` is `slope`: place by place, or of a row's one value (N, 1) by all places of it.

    Differentiable once: the slope is a constant.
    """
    return _WithSlope.apply(by, value, slope)


class _WithSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, by: torch.Tensor, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slope)
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return gradient * slope, None, None
