"""A router that takes experts which were chosen elsewhere (rollout routing replay, R3, arXiv 2510.11370).

Takes:  a router of transformers; for each row of its input the experts of every layer, -1 where they aren't known.
Gives:  ReplayedRouter: the router's own weights of those experts, and whether it would have chosen the same.
Knows:  routers choose by a `topk` over the scores of all experts. Its result is replaced, and all that the router does
        before and after stays its own: whatever a family makes of its scores, and gradients to them.
Never:  weighs an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.return_types import topk as TopK


class ReplayedRouter:
    """Stands in the place of the router's `forward`. Whoever runs the model calls `expect` before."""

    agreed_R: Tensor | None = None  # of the last forward: 1 or 0, nan where the experts aren't known; none: nothing is

    def __init__(self, router: nn.Module, layer: int, *, replays: bool) -> None:
        """`layer`: the place of the router's experts among those given; `replays`: they are taken, else compared."""
        self._forward, self._layer, self._replays = router.forward, layer, replays
        self._num_experts = _num_experts(router)
        self._experts_RK: Tensor | None = None
        router.forward = self._run

    def expect(self, experts_LRK: Tensor | None) -> None:
        """They hold until the next call: a backward that computes the layer again has the same."""
        self._experts_RK = None if experts_LRK is None else experts_LRK[self._layer]
        self.agreed_R = None

    def _run(self, *given: Any, **more: Any) -> Any:
        if self._experts_RK is None:
            return self._forward(*given, **more)
        experts_RK = self._experts_RK.long()
        with _Given(experts_RK, self._num_experts, replays=self._replays) as mode:
            output = self._forward(*given, **more)
        assert mode.own_RK is not None, f"layer {self._layer}: the router has not chosen by topk"
        known_R = (experts_RK >= 0).all(-1)
        same_R = (mode.own_RK.sort(-1).values == experts_RK.sort(-1).values).all(-1)
        self.agreed_R = torch.where(known_R, same_R.float(), torch.nan)
        return output


class _Given(TorchFunctionMode):
    """While it lasts the `topk` over all experts gives these, where they are known."""

    own_RK: Tensor | None = None  # what it would have given

    def __init__(self, experts_RK: Tensor, num_experts: int, *, replays: bool) -> None:
        super().__init__()
        self._experts_RK, self._num_experts, self._replays = experts_RK, num_experts, replays

    def __torch_function__(self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, object] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func.__name__ != "topk":
            return output
        scores, own_RK = args[0], output[1]
        if scores.shape[1:] != (self._num_experts,) or own_RK.shape != self._experts_RK.shape:
            return output  # of groups of experts, say
        self.own_RK = own_RK
        if not self._replays:
            return output
        chosen_RK = torch.where(self._experts_RK >= 0, self._experts_RK, own_RK)
        return TopK((scores.gather(-1, chosen_RK), chosen_RK))


def takes_given_experts(router: nn.Module) -> bool:
    """Whether a router of a skeleton gives the experts that it is given."""
    num_experts = _num_experts(router)
    hidden = torch.empty(2, router.weight.shape[-1], device="meta", dtype=router.weight.dtype)
    num_chosen = int(router(hidden)[2].shape[-1])
    given_RK = torch.empty(2, num_chosen, device="meta", dtype=torch.long)
    with _Given(given_RK, num_experts, replays=True) as mode:
        router(hidden)
    return mode.own_RK is not None


def layer_of(router: nn.Module, model: nn.Module) -> int:
    """The number of the layer that it is in, from 0, as its name has it (layers without experts count)."""
    name = next(name for name, module in model.named_modules() if module is router)
    return next(int(part) for part in name.split(".") if part.isdigit())


def _num_experts(router: nn.Module) -> int:
    return int(getattr(router.weight, "ds_shape", router.weight.shape)[0])
