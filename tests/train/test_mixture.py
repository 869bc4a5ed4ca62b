"""A mixture of experts on two ranks: hub names under every ZeRO stage, routers, an adapter, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.conftest import MIXTURE_REPEATS

pytestmark = [pytest.mark.system, pytest.mark.timeout(900)]
STAGES = ("0", "3", *(pytest.param(stage, marks=pytest.mark.all) for stage in "12"))


@pytest.fixture
def metrics(two: dict, request: pytest.FixtureRequest) -> dict:
    """By ZeRO stage."""
    between = request.node.get_closest_marker("all")
    return two["metrics"] | (request.getfixturevalue("launched")[MIXTURE_REPEATS]["metrics"] if between else {})


def read(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def largest_gap(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert got.keys() == wanted.keys()
    return max(float((got[name] - wanted[name]).abs().max()) for name in wanted)


def changed(folder: Path, name: str) -> set[str]:
    """Names of the weights that a training has moved."""
    start, now = read(folder, "mixture_untouched"), read(folder, name)
    return {name for name in start if not torch.equal(start[name], now[name])}


def test_weights_that_nobody_trained_are_those_that_were_read(folder: Path, two: dict) -> None:
    """Gathered from two ranks' shares, expert by expert."""
    given, were = read(folder, "mixture_untouched"), load_file(folder / "mixture" / "model.safetensors")
    assert given.keys() == were.keys() and "model.layers.1.mlp.experts.3.down_proj.weight" in were
    assert all(torch.equal(given[name], were[name]) for name in were)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_trains_the_same_experts(folder: Path, metrics: dict, stage: str) -> None:
    assert largest_gap(read(folder, f"mixture_{stage}"), read(folder, "mixture_0")) < 2e-5
    assert metrics[stage]["router/load_max"] == metrics["0"]["router/load_max"]


def test_what_the_routers_do_is_measured(two: dict) -> None:
    """Each of 4 experts has from a quarter of the choices to half of them: two are chosen for a token."""
    metrics = two["metrics"]["0"]
    loads = [metrics["router/load_max/0"], metrics["router/load_max/1"]]
    assert all(1 <= load <= 2 for load in loads) and metrics["router/load_max"] == max(loads)
    assert 0 < metrics["router/balance"] < 4 and 0 <= metrics["router/unused"] < 1


def test_the_balance_loss_moves_routers(folder: Path, two: dict) -> None:
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(read(folder, "mixture_0")[router], read(folder, "mixture_free")[router])


def test_frozen_routers_stay_and_the_rest_learns(folder: Path, two: dict) -> None:
    names = changed(folder, "mixture_frozen")
    assert not any(".gate.weight" in name for name in names)
    assert "model.layers.0.mlp.experts.0.up_proj.weight" in names
    assert "model.layers.0.mlp.gate.weight" in changed(folder, "mixture_free")


def test_an_adapter_on_attention_changes_attention_alone(folder: Path, two: dict) -> None:
    names = changed(folder, "mixture_lora")
    assert names == {f"model.layers.{i}.self_attn.{target}.weight" for i in (0, 1) for target in ("q_proj", "o_proj")}


@pytest.mark.parametrize("stage", STAGES)
def test_an_adapter_on_experts_changes_experts_alike_under_every_zero_stage(
    folder: Path, metrics: dict, stage: str,
) -> None:
    names = changed(folder, f"mixture_lora_{stage}")
    assert all(".experts." in name or name.endswith("q_proj.weight") for name in names)
    assert {f"model.layers.1.mlp.experts.{i}.{which}_proj.weight" for i in range(4)
            for which in ("gate", "up", "down")} <= names
    assert largest_gap(read(folder, f"mixture_lora_{stage}"), read(folder, "mixture_lora_0")) < 2e-5


def test_a_checkpoint_and_a_saved_model_hold_what_was_trained(folder: Path, two: dict) -> None:
    assert two["resumed"]
    saved, wanted = load_file(folder / "mixture_saved" / "model.safetensors"), read(folder, "mixture_wanted")
    assert saved.keys() == wanted.keys() and all(torch.equal(saved[name], wanted[name]) for name in wanted)
