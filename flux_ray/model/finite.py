"""Whether numbers are finite, in one pass over memory and without a copy of them.

Takes:  tensors, on any one device.
Gives:  `not_finite`: the places of those that hold nan or infinity.
Knows:  a sum is nan or infinite where one of its parts is. So it may be of many large numbers: those are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def not_finite(tensors: Sequence[Tensor]) -> list[int]:
    """The places of tensors that hold a value which is nan or infinite. One wait for the device, where all is well."""
    if not tensors:
        return []
    sums = torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in tensors])
    odd = sums.isfinite().logical_not().nonzero().flatten().tolist()
    return [i for i in odd if not bool(tensors[i].isfinite().all())]
