"""Which experts a mixture's routers choose: how evenly, and the loss that keeps them even.

Takes:  a transformers model; the rows of its hidden states that are tokens.
Gives:  Routing: the balance loss of a forward, how often each expert was chosen; `load_metrics`, `check_routers`.
Knows:  transformers says which modules are routers, and that they give (logits, weights, experts); padding goes
        through experts too, and counts nowhere here.
Never:  changes a choice.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flux_ray.config import TrainConfig
from flux_ray.config.objectives import PAIRS
from flux_ray.errors import UserError
from flux_ray.observability.described import Described

#: Over all tokens that are trained on.
METRICS = (
    Described("router/balance", "mean over micro-batches of what `train.router_balance_coef` multiplies: E·Σ f·P over "
              "a layer's E experts, f the share of choices, P the mean probability; mean over layers. 1: all get "
              "equally much", "1", "trained tokens", "near 1", "grows step by step: set "
              "`train.router_balance_coef`, or `train.freeze_routers=true`"),
    Described("router/load_max/NAME", "of the layer with this number among those with experts: the busiest expert's "
              "share of the choices, times E", "1", "choices", "well below E / k, for k choices a token",
              "near it the layer uses k experts alone"),
    Described("router/load_max", "the largest of them", "1", "layers", "", "as `router/load_max/NAME`"),
    Described("router/unused", "share of all layers' experts that no token of the step chose", "1", "experts", "",
              "grows: as `router/balance`. Large in tiny batches: more tokens a step say more"),
)


def routers_of(hf: PreTrainedModel) -> list[nn.Module]:
    """A mixture's routers, by layer; none in a dense model."""
    recorded = getattr(hf, "_can_record_outputs", None) or {}
    kind = recorded.get("router_logits")
    kind = getattr(kind, "target_class", kind)
    return [] if kind is None else [module for module in hf.modules() if type(module) is kind]


def check_routers(hf: PreTrainedModel, train: TrainConfig, *, learns_from: str) -> None:
    """UserError for options of routers that the model hasn't, or where their loss wouldn't reach them."""
    coef = f"train.router_balance_coef={train.router_balance_coef:g}"
    if not routers_of(hf):
        option = coef if train.router_balance_coef else "train.freeze_routers=true"
        raise UserError(f"{option}: the model ({hf.config.model_type}) has no routers: leave the option out")
    if not train.router_balance_coef:
        return
    if learns_from == PAIRS:
        raise UserError(f"{coef} is for policy gradients and sft: a loss of pairs has no weights of tokens")
    if train.freeze_routers:
        raise UserError(f"{coef} with train.freeze_routers=true: nothing would learn from that loss: leave one out")
    if train.lora.rank:
        raise UserError(f"{coef} with train.lora.rank={train.lora.rank}: an adapter leaves routers as they are")
    if train.gradient_checkpointing:
        raise UserError(f"{coef} with train.gradient_checkpointing=true: the routers' logits are made again in "
                        "backward, which that loss doesn't see: leave one out")


def balance_loss(logits_SE: Tensor, experts_SK: Tensor) -> Tensor:
    """E·Σ_e f_e·P_e: 1 where all experts get equally much, E where one gets all. f: share of the choices, P: mean
    probability (Switch Transformers, arXiv 2101.03961, equation 4, for k choices a token)."""
    num_experts = logits_SE.shape[-1]
    probability_E = logits_SE.float().softmax(-1).mean(0)
    share_E = counts(experts_SK, num_experts).float() / experts_SK.numel()
    return num_experts * (share_E * probability_E).sum()


def counts(experts_SK: Tensor, num_experts: int) -> Tensor:
    """(E,) int64: how often each expert was chosen."""
    return torch.bincount(experts_SK.flatten(), minlength=num_experts)


class Routing:
    """What the routers of one model chose in its last forward. Whoever runs the model calls `take` after each."""

    balance: Tensor  # (), the mean over layers
    counts_LE: Tensor  # int64, choices

    def __init__(self, hf: PreTrainedModel) -> None:
        self._routers = routers_of(hf)
        self._chosen: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # router ► logits (R, E), experts (R, K)
        for router in self._routers:
            router.register_forward_hook(self._note)

    def _note(self, router: nn.Module, given: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._chosen[router] = output[0], output[2]

    def freeze(self) -> None:
        """The routers stay as they are: nobody trains them."""
        for router in self._routers:
            router.requires_grad_(False)

    def take(self, rows_S: Tensor) -> None:
        """The forward has ended; `rows_S`: where its tokens lie among the rows that went through the routers."""
        chosen = [(logits[rows_S], experts[rows_S]) for logits, experts in map(self._chosen.pop, self._routers)]
        self.balance = torch.stack([balance_loss(*of_layer) for of_layer in chosen]).mean()
        self.counts_LE = torch.stack([counts(experts, logits.shape[-1]) for logits, experts in chosen])


def load_metrics(counts_LE: Tensor) -> dict[str, float]:
    """By layer that has a router: the busiest expert's share of the choices, times the number of experts; their
    largest; the share of experts without a token."""
    of_layer = (counts_LE.max(1).values / counts_LE.sum(1) * counts_LE.shape[1]).tolist()
    by_layer = {f"router/load_max/{i}": load for i, load in enumerate(of_layer)}
    return by_layer | {"router/load_max": max(of_layer), "router/unused": float((counts_LE == 0).float().mean())}
