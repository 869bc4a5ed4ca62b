"""What a model's weights are called, and how they lie, in the files that hubs hold and engines read.

Takes:  a transformers model on the meta device: modules without memory.
Gives:  `hub_parts`: each tensor that is trained ► the tensors of a checkpoint that are in it.
Knows:  transformers' own conversion tables, run backwards: a part is a view of what is trained, so it takes no memory.
Never:  copies a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from flux_ray.errors import UserError


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint, as a view of one that is trained; strides and offset are in elements."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, whole: Tensor) -> Tensor:
        """The view of `whole`, which must be contiguous."""
        assert whole.is_contiguous(), f"{self.name} is a part of a tensor with strides {whole.stride()}"
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)


#: Name of what is trained ► its parts. What isn't there is in a checkpoint as it is trained.
Parts: TypeAlias = dict[str, list[Part]]


def hub_parts(skeleton: PreTrainedModel, name: str) -> Parts:
    """Parameters and persistent buffers that a checkpoint has under other names, or in parts.

    UserError, which says `name`, where a checkpoint's tensor isn't a part of one that is trained.
    """
    state = {key: torch.empty_like(tensor, device="meta") for key, tensor in skeleton.state_dict().items()}
    of_storage = {_storage(tensor): key for key, tensor in state.items()}
    parts: Parts = {key: [] for key in state}
    with _NoCopies():
        kept = revert_weight_conversion(skeleton, dict(state))
    for hub_name, tensor in kept.items():
        ours = of_storage.get(_storage(tensor))
        if ours is None:
            raise UserError(f"{name} ({skeleton.config.model_type}): its checkpoint keeps {hub_name} otherwise than it "
                            "is trained, and not as a part of one tensor: such models are not supported")
        parts[ours].append(Part(hub_name, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())))
    for key, of in parts.items():
        num = sum(torch.Size(part.shape).numel() for part in of)
        assert num == state[key].numel(), f"{key}: a checkpoint has {num} of its {state[key].numel()} elements"
    return {key: of for key, of in parts.items() if [part.name for part in of] != [key]}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _NoCopies(TorchFunctionMode):
    """While it lasts `contiguous` gives the tensor as it lies: what transformers cuts or turns stays a view."""

    def __torch_function__(self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, object] | None = None) -> object:
        return args[0] if func.__name__ == "contiguous" else func(*args, **(kwargs or {}))
