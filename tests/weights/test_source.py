"""In which type each weight travels."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux_ray.model import load_policy
from flux_ray.train import full_weights
from flux_ray.weights.source import TrainerSource
from tests.families import make_family

pytestmark = pytest.mark.unit
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def test_a_router_s_correction_stays_float32_beside_bfloat16(tmp_path: Path) -> None:
    """As its checkpoint and its engine have it; rounded, it would choose other experts."""
    policy = load_policy(make_family("GLM-4 MoE", tmp_path), dtype=torch.bfloat16, chunk_tokens=8)
    correction = torch.tensor([1.0001, 2.0002, 3.0003, 4.0004])
    policy.hf.get_submodule(BIAS.rpartition(".")[0]).e_score_correction_bias.copy_(correction)
    source = TrainerSource(SimpleNamespace(
        weight_metadata=lambda: full_weights.metadata(policy),
        iter_weights=lambda bucket_bytes: full_weights.iter_weights(policy, bucket_bytes),
    ), bucket_bytes=1000, dtype=torch.bfloat16)
    described = {param.name: param.dtype for param in source.metadata()}
    given = {name: tensor.clone() for name, tensor in source}
    assert {name: tensor.dtype for name, tensor in given.items()} == described
    assert [name for name, dtype in described.items() if dtype == torch.float32] == [BIAS]
    assert torch.equal(given[BIAS], correction)


def test_weights_travel_as_the_engines_hold_them_and_whole_numbers_as_they_are() -> None:
    weights = {"weight": torch.ones(4), "steps": torch.ones(2, dtype=torch.int64)}
    source = TrainerSource(SimpleNamespace(
        weight_metadata=lambda: [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()],
        iter_weights=lambda bucket_bytes: iter(weights.items())), bucket_bytes=1000, dtype=torch.bfloat16)
    assert [param.dtype for param in source.metadata()] == [torch.bfloat16, torch.int64]
