"""Experts that don't hold what was sent are told, one of each layer at each update; right ones never are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flux_ray.weights.attest_experts import ExpertReceipts

pytestmark = pytest.mark.unit
E, WIDTH, HIDDEN = 3, 4, 6
PROJECTIONS = {"gate_proj": ("w1", WIDTH, HIDDEN), "up_proj": ("w3", WIDTH, HIDDEN), "down_proj": ("w2", HIDDEN, WIDTH)}


class Experts(nn.Module):
    """A layer as vLLM has it: all experts in two tensors, plain."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_name = "model.layers.0.mlp.experts"
        self.w13_weight = nn.Parameter(torch.zeros(E, 2 * WIDTH, HIDDEN), requires_grad=False)
        self.w2_weight = nn.Parameter(torch.zeros(E, HIDDEN, WIDTH), requires_grad=False)
        self.quant_method = SimpleNamespace(moe_kernel=None)

    def get_expert_mapping(self) -> list[tuple[str, str, int, str]]:
        return [("", f"experts.{e}.{name}.", e, shard) for e in range(E) for name, (shard, *_) in PROJECTIONS.items()]

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        def of(e: int, name: str) -> torch.Tensor:
            return weights[f"model.layers.0.mlp.experts.{e}.{name}.weight"]

        for e in range(E):
            self.w13_weight[e] = torch.cat([of(e, "gate_proj"), of(e, "up_proj")])
            self.w2_weight[e] = of(e, "down_proj")


def drawn() -> dict[str, torch.Tensor]:
    return {f"model.layers.0.mlp.experts.{e}.{name}.weight": torch.randn(rows, columns)
            for e in range(E) for name, (_, rows, columns) in PROJECTIONS.items()}


def updated(receipts: ExpertReceipts, layer: Experts, *, loaded: bool = True) -> list[str]:
    weights = drawn()
    receipts.begin()
    receipts.take(weights.items())
    if loaded:
        layer.load(weights)
    return receipts.wrong()


def test_what_stayed_as_it_was_is_told_whichever_expert_has_its_turn() -> None:
    layer = Experts()
    receipts = ExpertReceipts(layer)
    assert updated(receipts, layer) == []
    told = [updated(receipts, layer, loaded=False) for _ in range(E)]
    experts = [{name.split(".")[5] for name in names} for names in told]
    assert all(len(names) == len(PROJECTIONS) for names in told) and experts == [{"2"}, {"0"}, {"1"}]
    assert updated(receipts, layer) == []


def test_one_tensor_that_was_not_loaded_is_told_by_its_parts() -> None:
    layer = Experts()
    receipts = ExpertReceipts(layer)
    updated(receipts, layer)
    weights = drawn()
    receipts.begin()
    receipts.take(weights.items())
    layer.load(weights)
    layer.w2_weight.zero_()
    assert receipts.wrong() == ["model.layers.0.mlp.experts.2.down_proj.weight"]


def test_a_form_that_never_matched_is_called_wrong_only_where_it_is_known() -> None:
    layer = Experts()
    receipts = ExpertReceipts(layer)
    assert updated(receipts, layer, loaded=False) == [] and updated(receipts, layer, loaded=False) == []


def test_what_vllm_packed_for_its_kernel_on_cpu_is_read_as_it_packs_it() -> None:
    """And plain weights over packed ones, which its reload leaves, are told at once."""
    ops = pytest.importorskip("vllm._custom_ops")
    hidden, width = 64, 32
    layer = Experts()
    layer.quant_method.moe_kernel = SimpleNamespace(fused_experts=SimpleNamespace(isa="vec"))
    layer.w13_weight = nn.Parameter(torch.zeros(E, 2 * width, hidden), requires_grad=False)
    layer.w2_weight = nn.Parameter(torch.zeros(E, hidden, width), requires_grad=False)
    weights = {f"model.layers.0.mlp.experts.{e}.{name}.weight": torch.randn(*shape) for e in range(E)
               for name, shape in (("gate_proj", (width, hidden)), ("up_proj", (width, hidden)),
                                   ("down_proj", (hidden, width)))}
    receipts = ExpertReceipts(layer)
    for packed in (True, False):
        receipts.begin()
        receipts.take(weights.items())
        layer.load(weights)
        if packed:
            layer.w13_weight.copy_(ops.cpu_prepack_moe_weight(layer.w13_weight.data, "vec"))
            layer.w2_weight.copy_(ops.cpu_prepack_moe_weight(layer.w2_weight.data, "vec"))
        assert len(receipts.wrong()) == (0 if packed else len(PROJECTIONS))
