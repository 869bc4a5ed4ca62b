"""Reads whole weights out of a training engine, wherever ZeRO keeps their parts.

Takes:  a model, as DeepSpeed holds it.
Gives:  (name, tensor) by checkpoint name, in the model's own order, gathered bucket by bucket; an adapter is merged in.
Knows:  a parameter under two names goes once, under the first. A partitioned parameter has no shape of its own.
Never:  holds more than one bucket of gathered weights, and one merged beside it (of experts one expert); changes a
        weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from flux_ray.model import PackedModel
from flux_ray.model.finite import not_finite
from flux_ray.model.hub_names import Part
from flux_ray.model.lora import Factors


@dataclass(frozen=True)
class Entry:
    """One tensor as the engine keeps it; `factors`: its adapter, where it has one; `parts`: a checkpoint's, where it
    keeps the tensor otherwise."""

    name: str
    tensor: Tensor
    factors: Factors | None
    parts: list[Part] | None

    @property
    def num_bytes(self) -> int:
        return whole_shape(self.tensor).numel() * self.tensor.element_size()

    @property
    def kept(self) -> list[Tensor]:
        """The tensors that `given` needs whole."""
        return [self.tensor, *([] if self.factors is None else (self.factors.a_RI, self.factors.b_OR))]

    def described(self) -> Iterator[tuple[str, torch.dtype, torch.Size]]:
        """(name, type, shape) of what a checkpoint has of it."""
        if self.parts is None:
            yield self.name, self.tensor.dtype, whole_shape(self.tensor)
        for part in self.parts or ():
            yield part.name, self.tensor.dtype, torch.Size(part.shape)

    def given(self) -> Iterator[tuple[str, Tensor]]:
        """The same, with their numbers, while `kept` is whole."""
        weight = self.tensor.detach()
        if self.factors is not None and self.factors.num_experts and self.parts is not None:
            for part in self.parts:
                yield part.name, self._of_expert(part, weight, self.factors)
            return
        weight = weight if self.factors is None else self.factors.merged(weight)
        if self.parts is None:
            yield self.name, weight
        for part in self.parts or ():
            yield part.name, part.of(weight)

    def _of_expert(self, part: Part, weight: Tensor, factors: Factors) -> Tensor:
        """The part of one expert, merged by itself."""
        expert, offset = divmod(part.offset, weight[0].numel())
        return replace(part, offset=offset).of(factors.of_expert(expert).merged(weight[expert]))


def parameters(model: PackedModel) -> list[tuple[str, nn.Parameter]]:
    """Trained parameters by the names that the engine has for them, each once."""
    return [(name, p) for name, p in model.hf.named_parameters() if p.requires_grad]


def whole_shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)


def whole(parameters: Sequence[Tensor]) -> AbstractContextManager[object]:
    """Makes the parameters whole while it lasts. A collective where ZeRO-3 has partitioned them, else nothing."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def first_not_finite(model: PackedModel) -> int | None:
    """The place among `parameters` of the first with a value that isn't finite, of those that lie on this rank."""
    mine = [getattr(p, "ds_tensor", p).detach() for _, p in parameters(model)]
    return next(iter(not_finite(mine)), None)


def metadata(model: PackedModel) -> list[tuple[str, torch.dtype, torch.Size]]:
    """(name, type, shape) of every tensor that `iter_weights` gives, in its order."""
    return [described for entry in _checkpoint_entries(model) for described in entry.described()]


def iter_weights(model: PackedModel, bucket_bytes: int) -> Iterator[tuple[str, Tensor]]:
    """Whole weights, one by one; each is valid until the next is asked for. All ranks iterate together to the end."""
    bucket: list[Entry] = []
    num_bytes = 0
    for entry in _checkpoint_entries(model):
        if bucket and num_bytes + entry.num_bytes > bucket_bytes:
            yield from _gathered(bucket)
            bucket, num_bytes = [], 0
        bucket.append(entry)
        num_bytes += entry.num_bytes
    yield from _gathered(bucket)


def iter_trained(model: PackedModel) -> Iterator[tuple[str, Tensor]]:
    """Whole trained parameters, one by one, as `iter_weights` gives whole weights."""
    for name, parameter in parameters(model):
        with whole([parameter]):
            yield name, parameter.detach()


def _gathered(bucket: list[Entry]) -> Iterator[tuple[str, Tensor]]:
    with whole([tensor for entry in bucket for tensor in entry.kept]):
        for entry in bucket:
            yield from entry.given()


def _checkpoint_entries(model: PackedModel) -> Iterator[Entry]:
    """What a checkpoint holds: parameters and persistent buffers, a tied one under its first name only."""
    seen: set[int] = set()
    adapter = model.adapter
    factors = adapter.factors() if adapter else {}
    for kept_name, tensor in model.hf.state_dict(keep_vars=True).items():
        name = adapter.checkpoint_name(kept_name) if adapter else kept_name
        if name is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield Entry(name, tensor, factors.get(name), model.parts.get(name))
