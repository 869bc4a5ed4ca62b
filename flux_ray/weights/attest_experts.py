"""Whether a mixture's experts hold what was sent: a part of an engine worker's check of each update.

Takes:  the model; what came in, before it is loaded.
Gives:  `ExpertReceipts.wrong`: the names that the model doesn't hold.
Knows:  vLLM keeps all experts of a layer as two tensors, w13 (gate above up) and w2; on CPU it packs each expert for
        its kernel. One expert of each layer is compared, another one each time: it is packed again, from what came.
Never:  looks at an engine of several workers, which holds parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

W13, W2 = "w13_weight", "w2_weight"
ROWS = {"w1": (W13, 0), "w3": (W13, 1), "w2": (W2, 0)}  # what a checkpoint has ► its tensor, its place there


class Held(NamedTuple):
    """Where one tensor of a checkpoint is kept."""

    layer: Any  # vLLM's RoutedExperts
    tensor: str
    part: int
    expert: int


class ExpertReceipts:
    def __init__(self, model: nn.Module) -> None:
        self._held = {name: held for module in model.modules() for name, held in _places(module)}
        self._right: set[str] = set()  # tensors of which one was as it was sent
        self._turn = 0
        self._came: dict[tuple[nn.Module, str], dict[int, tuple[str, Tensor]]] = {}

    def begin(self) -> None:
        self._turn, self._came = self._turn + 1, {}

    def take(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The bytes that came, before they are loaded."""
        for name, tensor in tensors:
            held = self._held.get(name)
            if held is not None and held.expert == self._turn % len(getattr(held.layer, held.tensor)):
                self._came.setdefault((held.layer, held.tensor), {})[held.part] = name, tensor.clone()

    @torch.no_grad()
    def wrong(self) -> list[str]:
        """Now that all is loaded."""
        wrong = []
        for (layer, tensor), parts in self._came.items():
            right = self._is_held(layer, tensor, [parts[i][1] for i in sorted(parts)])
            if right:
                self._right.add(tensor)
            elif right is not None and (tensor in self._right or _isa(layer)):  # else it may be kept in another form
                wrong += [name for name, _ in parts.values()]
        self._came = {}
        return wrong

    def _is_held(self, layer: Any, tensor: str, parts: list[Tensor]) -> bool | None:
        """None where the layer keeps it in another shape, as padding gives."""
        whole = getattr(layer, tensor)
        kept, sent = whole[self._turn % len(whole)], torch.cat(parts)
        if kept.shape != sent.shape or kept.dtype != sent.dtype:
            return None
        return torch.equal(kept, _packed(layer, sent))


def _places(module: Any) -> Iterable[tuple[str, Held]]:
    if not hasattr(module, "get_expert_mapping") or not hasattr(module, W13):
        return
    outside = module.layer_name.removesuffix("experts")
    for _, weight_name, expert, shard in module.get_expert_mapping():
        if shard in ROWS:
            yield f"{outside}{weight_name}weight", Held(module, *ROWS[shard], expert)


def _packed(layer: Any, sent: Tensor) -> Tensor:
    """As the layer's kernel has it; the same where that has no form of its own."""
    isa = _isa(layer)
    if isa is None:
        return sent
    from vllm._custom_ops import cpu_prepack_moe_weight

    return cpu_prepack_moe_weight(sent[None].contiguous(), isa)[0]


def _isa(layer: Any) -> str | None:
    """What vLLM's kernel for experts on CPU packs for; None for any other."""
    kernel = getattr(layer.quant_method, "moe_kernel", None)
    return getattr(getattr(kernel, "fused_experts", None), "isa", None)
