"""RMSNorm in blocks gives transformers' own, bit by bit; its gradients are those of the formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from flux_ray.model import load_policy, norm
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit
WIDTH = 48


def with_random_weight(kind: type[nn.Module], dtype: torch.dtype) -> nn.Module:
    module = kind(WIDTH, eps=1e-5)
    nn.init.normal_(module.weight, mean=1.0)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Qwen3RMSNorm, LlamaRMSNorm])
def test_the_same_forward_and_the_formulas_gradients(kind: type[nn.Module], dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(norm, "BLOCK_NUMBERS", 7 * WIDTH)  # several blocks, the last not full
    torch.manual_seed(0)
    theirs = with_random_weight(kind, dtype)
    ours = nn.Sequential(copy.deepcopy(theirs))
    assert norm.put_in_place(ours) == 1
    hidden = torch.randn(4, 6, 3, WIDTH).to(dtype).requires_grad_()
    gradient = torch.randn(4, 6, 3, WIDTH).to(dtype)
    output = ours(hidden)
    assert torch.equal(output, theirs(hidden))

    x, w = hidden.detach().double().requires_grad_(), theirs.weight.detach().double().requires_grad_()
    formula = w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    wanted = torch.autograd.grad(formula, (x, w), gradient.double())
    got = torch.autograd.grad(output, (hidden, ours[0].weight), gradient)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() / b.norm() < (1e-6 if dtype == torch.float32 else 4e-3)


def test_another_norm_is_left_as_it_is() -> None:
    """Gemma's multiplies by 1 + w."""
    model = nn.Sequential(with_random_weight(GemmaRMSNorm, torch.float32))
    assert norm.put_in_place(model) == 0 and type(model[0]) is GemmaRMSNorm


def test_a_policy_on_a_cpu_has_it_and_keeps_its_names(tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.skip("models keep their own norms where there is a GPU")
    path = tiny_model(tmp_path, tied=True)
    policy = load_policy(path, dtype=torch.float32, chunk_tokens=64)
    norms = [name for name, module in policy.hf.named_modules() if isinstance(module, norm.BlockedRMSNorm)]
    assert "model.norm" in norms and "model.norm.weight" in dict(policy.hf.named_parameters())
    kinds = {type(module) for module in policy.modules() if type(module).__name__.endswith("RMSNorm")}
    assert kinds == {norm.BlockedRMSNorm}
