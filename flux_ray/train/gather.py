"""Whole weights out of a training engine, wherever ZeRO keeps their parts.

Takes:  the policy, as DeepSpeed holds it.
Gives:  (name, tensor) by checkpoint name, in the model's own order, gathered bucket by bucket.
Knows:  ties: a parameter under two names goes once, under the first; partitioned ones have no shape of their own.
Never:  holds more than one bucket of gathered weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flux_ray.model import PolicyModel


def parameters(policy: PolicyModel) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters by checkpoint name, each once."""
    return [(name, p) for name, p in policy.hf.named_parameters() if p.requires_grad]


def whole_shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def whole(parameters: list[Any]) -> AbstractContextManager[Any]:
    """While it lasts the parameters are whole. A collective where ZeRO-3 has partitioned them, nothing elsewhere."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def metadata(policy: PolicyModel) -> list[tuple[str, torch.dtype, torch.Size]]:
    """(name, type, shape) of every tensor that `iter_weights` gives, in its order."""
    return [(name, tensor.dtype, whole_shape(tensor)) for name, tensor in _checkpoint_tensors(policy)]


def iter_weights(policy: PolicyModel, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Whole weights, one by one; each is valid until the next is asked for. All ranks iterate together to the end."""
    bucket: list[tuple[str, Tensor]] = []
    num_bytes = 0
    for name, tensor in _checkpoint_tensors(policy):
        size = whole_shape(tensor).numel() * tensor.element_size()
        if bucket and num_bytes + size > bucket_bytes:
            yield from _gathered(bucket)
            bucket, num_bytes = [], 0
        bucket.append((name, tensor))
        num_bytes += size
    yield from _gathered(bucket)


def _gathered(bucket: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    with whole([tensor for _, tensor in bucket]):
        for name, tensor in bucket:
            yield name, tensor.detach()


def _checkpoint_tensors(policy: PolicyModel) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds: parameters and persistent buffers, a tied one under its first name only."""
    seen: set[int] = set()
    for name, tensor in policy.hf.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor
