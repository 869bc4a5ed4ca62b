"""Which experts a mixture's routers choose: how evenly, whether as the engine, and the loss that keeps them even.

Takes:  a transformers model; the rows of its hidden states that are tokens; the experts that an engine chose.
Gives:  Routing: the balance loss of a forward, how often each expert was chosen, what the engine chose alike;
        `load_metrics`, `check_routers`.
Knows:  transformers says which modules are routers, and that they give (logits, weights, experts); padding goes
        through experts too, and counts nowhere here.
Never:  changes a choice, unless it is told to replay the engine's (router_replay.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flux_ray.config import Config, PolicyGradientConfig
from flux_ray.config.objectives import PAIRS
from flux_ray.errors import UserError
from flux_ray.model.router_replay import ReplayedRouter, layer_of, takes_given_experts
from flux_ray.observability.described import Described, Range
from flux_ray.observability.metrics import Mean, Metric

#: Over all tokens that are trained on.
METRICS = (
    Described("rollout/router_agreement", "share of sampled tokens × layers with experts at which trainer and engine "
              "choose the same set of experts, before the step's first update; with `algo.router_replay` what the "
              "trainer would have chosen. Where engines return theirs (`rollout.return_experts`)", "1",
              "tokens that the present version sampled", Range(low=0.9),
              "engine and trainer run tokens through other experts: `algo.router_replay=true`; in float32 it is 1"),
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


def _asked(config: Config) -> str | None:
    """An option that only a mixture has; None where none is set."""
    if config.train.router_balance_coef:
        return f"train.router_balance_coef={config.train.router_balance_coef:g}"
    if config.train.freeze_routers:
        return "train.freeze_routers=true"
    return config.returned_experts if isinstance(config, PolicyGradientConfig) else None


def check_routers(skeleton: Callable[[], PreTrainedModel], config: Config) -> None:
    """UserError for options of routers that the model hasn't, or where they wouldn't reach them."""
    asked = _asked(config)
    if asked is None:
        return
    hf = skeleton()
    kind = hf.config.model_type
    if not routers_of(hf):
        raise UserError(f"{asked}: the model ({kind}) has no routers: leave the option out")
    if isinstance(config, PolicyGradientConfig) and config.returned_experts:
        strange = next((router for router in routers_of(hf) if not takes_given_experts(router)), None)
        if strange is not None:
            raise UserError(f"{config.returned_experts}: the model ({kind}) chooses experts otherwise than by the "
                            f"largest of their scores ({type(strange).__name__}): leave the option out")
    train, coef = config.train, f"train.router_balance_coef={config.train.router_balance_coef:g}"
    if not train.router_balance_coef:
        return
    if config.learns_from == PAIRS:
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
    """What the routers of one model chose in its last forward. Whoever runs the model calls `expect` before each, and
    `take` after it."""

    balance: Tensor  # (), the mean over layers
    counts_LE: Tensor  # int64, choices
    agreed_S: Tensor | None  # share of the layers in which the engine chose alike, nan where its choice isn't known

    def __init__(self, hf: PreTrainedModel, *, replays: bool = False) -> None:
        """`replays`: where the engine's choice is known, it is taken."""
        self._routers = routers_of(hf)
        self._replayed = [ReplayedRouter(router, layer_of(router, hf), replays=replays) for router in self._routers]
        self._chosen: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # router ► logits (R, E), experts (R, K)
        for router in self._routers:
            router.register_forward_hook(self._note)

    def _note(self, router: nn.Module, given: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        self._chosen[router] = output[0], output[2]

    def freeze(self) -> None:
        """The routers stay as they are: nobody trains them."""
        for router in self._routers:
            router.requires_grad_(False)

    def expect(self, experts_SLK: Tensor | None, rows_S: Tensor, num_rows: int) -> None:
        """A forward of `num_rows` rows begins; its backward has the same experts. `rows_S`: where its tokens lie;
        `experts_SLK`: what the engine chose for them, -1 where that isn't known."""
        experts_LRK = None
        if experts_SLK is not None:
            experts_RLK = experts_SLK.new_full((num_rows, *experts_SLK.shape[1:]), -1)
            experts_RLK[rows_S] = experts_SLK
            experts_LRK = experts_RLK.transpose(0, 1)
        for router in self._replayed:
            router.expect(experts_LRK)

    def take(self, rows_S: Tensor) -> None:
        """The forward has ended; `rows_S`: where its tokens lie among the rows that went through the routers."""
        chosen = [(logits[rows_S], experts[rows_S]) for logits, experts in map(self._chosen.pop, self._routers)]
        self.balance = torch.stack([balance_loss(*of_layer) for of_layer in chosen]).mean()
        self.counts_LE = torch.stack([counts(experts, logits.shape[-1]) for logits, experts in chosen])
        agreed = [router.agreed_R for router in self._replayed]
        self.agreed_S = torch.stack([of[rows_S] for of in agreed if of is not None]).mean(0) if None not in agreed \
            else None

    def agreement(self, sampled_S: Tensor) -> dict[str, Metric]:
        """Of the last forward, over the passes that gave the tokens `sampled_S` (bool); empty where none is known."""
        if self.agreed_S is None:
            return {}
        # A token is sampled by the pass of the token before it. None is sampled at the start of a sequence.
        agreed = self.agreed_S[sampled_S.roll(-1)]
        agreed = agreed[~agreed.isnan()].double()
        return {"rollout/router_agreement": Mean(float(agreed.sum()), len(agreed))} if len(agreed) else {}


def load_metrics(counts_LE: Tensor) -> dict[str, float]:
    """By layer that has a router: the busiest expert's share of the choices, times the number of experts; their
    largest; the share of experts without a token."""
    of_layer = (counts_LE.max(1).values / counts_LE.sum(1) * counts_LE.shape[1]).tolist()
    by_layer = {f"router/load_max/{i}": load for i, load in enumerate(of_layer)}
    return by_layer | {"router/load_max": max(of_layer), "router/unused": float((counts_LE == 0).float().mean())}
