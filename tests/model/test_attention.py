"""Causal attention in blocks equals the formula and torch's own, both ways; what isn't plain goes to torch."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flux_ray.batch import make_micro_batch
from flux_ray.errors import UserError
from flux_ray.model import attention, load_policy
from flux_ray.model.load import resolve_layout
from flux_ray.records import Sample
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit
MODULE = SimpleNamespace(is_causal=True)


def tensors(rows: int, heads: tuple[int, int], tokens: int, dtype: torch.dtype, head_dim: int = 16) -> list[Tensor]:
    """Queries, keys, values and a gradient of the output, laid out as a model's projections leave them."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(rows, tokens, n, head_dim) for n in (heads[0], heads[1], heads[1], heads[0])]
    made = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    return [*(t.requires_grad_() for t in made[:3]), made[3]]


def exactly(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output and gradients by the formula, in float64."""
    q, k, v = (t.detach().double().requires_grad_() for t in (query, key, value))
    shared = query.shape[1] // key.shape[1]
    scores = q @ k.repeat_interleave(shared, 1).transpose(2, 3) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), float("-inf"))
    output = scores.softmax(-1) @ v.repeat_interleave(shared, 1)
    return [output, *torch.autograd.grad(output, (q, k, v), gradient.double())]


def in_blocks(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    output = attention.causal_blocks(MODULE, query, key, value, None)[0].transpose(1, 2)
    assert output.grad_fn is not None
    return [output, *torch.autograd.grad(output, (query, key, value), gradient)]


def off_by(got: list[Tensor], wanted: list[Tensor]) -> list[float]:
    """Relative errors: the norm of the difference by that of what was wanted."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]


@pytest.mark.parametrize("rows, heads, tokens", [
    (3, (4, 4), 200), (2, (4, 2), 129), (1, (6, 1), 400), (5, (2, 2), 131), (9, (8, 2), 300)])
def test_equals_the_formula(rows: int, heads: tuple[int, int], tokens: int) -> None:
    made = tensors(rows, heads, tokens, torch.float32)
    assert max(off_by(in_blocks(*made), exactly(*made))) < 1e-6


@pytest.mark.parametrize("tokens", [5, 64, 130, 300])
def test_bf16_is_as_near_the_formula_as_torchs(tokens: int) -> None:
    made = tensors(3, (4, 2), tokens, torch.bfloat16)
    query, key, value, gradient = made
    output = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torchs = [output, *torch.autograd.grad(output, (query, key, value), gradient)]
    got, wanted = in_blocks(*made), exactly(*made)
    assert all(a < 1.5 * b for a, b in zip(off_by(got, wanted), off_by(torchs, wanted), strict=True))


def test_without_gradients_it_gives_the_same() -> None:
    query, key, value, _ = tensors(2, (4, 2), 200, torch.float32)
    with torch.no_grad():
        output = attention.causal_blocks(MODULE, query, key, value, None)[0]
    assert output.grad_fn is None
    assert torch.equal(output, attention.causal_blocks(MODULE, query, key, value, None)[0])


@pytest.mark.parametrize("what", ["mask", "dropout", "not causal", "long", "one query", "float64"])
def test_anything_else_goes_to_torch(what: str, monkeypatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("taken in blocks")

    monkeypatch.setattr(attention._CausalBlocks, "apply", never)
    tokens = {"long": attention.LONGEST + 1}.get(what, 200)
    query, key, value, _ = tensors(1, (2, 2), tokens, torch.float64 if what == "float64" else torch.float32)
    if what == "one query":
        query = query[:, :, -1:]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1).fill_diagonal_(True) if what == "mask" else None
    output, _ = attention.causal_blocks(MODULE, query, key, value, mask, dropout=0.5 if what == "dropout" else 0.0,
                                        is_causal=what != "not causal")
    assert output.shape == (1, query.shape[2], 2, 16)


def test_a_policy_gives_the_same_with_either(tmp_path, monkeypatch) -> None:
    path = tiny_model(tmp_path, tied=True)
    rng = np.random.default_rng(0)
    samples = [Sample(rng.integers(3, 64, n).astype(np.int32), np.arange(n) >= 2, (np.arange(n) >= 2) / n)
               for n in (140, 200, 17)]
    micro_batch = make_micro_batch(samples, sample_ids=range(3))
    calls, results = [], []
    through = attention._CausalBlocks.apply
    monkeypatch.setattr(attention._CausalBlocks, "apply", lambda *given: calls.append(1) or through(*given))
    for name in ("sdpa", attention.CAUSAL_BLOCKS):
        policy = load_policy(path, dtype=torch.float32, attention=name, layout="padded", chunk_tokens=64)
        logprobs_S, _ = policy(micro_batch, temperature=1.0, with_entropy=False)
        logprobs_S.sum().backward()
        results.append([logprobs_S, *(p.grad for p in policy.parameters())])
    assert calls and results[1][0].detach().abs().sum() > 0
    assert max(off_by(results[1], [t.double() for t in results[0]])) < 1e-5


def test_it_is_what_auto_means_on_a_cpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("on a GPU auto is torch's, or flash attention")
    assert resolve_layout("auto", "auto", torch.float32) == ("padded", attention.CAUSAL_BLOCKS)
    assert resolve_layout("block_diagonal", "sdpa", torch.float32) == ("block_diagonal", "sdpa")


@pytest.mark.parametrize("name", ["no_such", "flash_attention_2"])
def test_one_that_cant_be_used_is_named(tmp_path, name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("flash attention may be had on a GPU")
    path = tiny_model(tmp_path, tied=True)
    with pytest.raises(UserError, match=f"model.attention={name} can't be used here: ") as told:
        load_policy(path, dtype=torch.float32, attention=name, layout="padded", chunk_tokens=64)
    assert "\n" not in str(told.value)
