"""What a chunk's logits give and how they are differentiated: as the compiler gets it, and as it is done elsewhere."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from flux_ray.model import head

pytestmark = pytest.mark.unit
ROWS, VOCABULARY = 5, 40


def chunk() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(ROWS, VOCABULARY, generator=generator),
            torch.randint(VOCABULARY, (ROWS,), generator=generator))


def by_the_formula(logits: torch.Tensor, scale: float, cap: float | None) -> torch.Tensor:
    return logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1.7])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_both_ways_give_the_same_numbers(scale: float, with_entropy: bool, cap: float | None) -> None:
    logits, targets = chunk()
    one = head.measure(logits.clone(), targets, scale, with_entropy, cap)
    other = head.fused_measure(logits.clone(), targets, scale, with_entropy, cap)
    wanted = by_the_formula(logits.double(), scale, cap).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(one[0].double(), wanted, atol=1e-5, rtol=1e-5)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert bool(one[2].any()) == with_entropy


@pytest.mark.parametrize("trains_entropy", [True, False])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_both_ways_give_the_gradient_of_the_formula(trains_entropy: bool, cap: float | None) -> None:
    logits, targets = chunk()
    scale, weights = 1.7, torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    entropy_weights = torch.tensor([0.3, 0.0, -1.0, 2.0, 0.1]) if trains_entropy else None
    z = logits.double().requires_grad_()
    log_p = torch.log_softmax(by_the_formula(z, scale, cap), -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    loss = (log_p.gather(1, targets[:, None])[:, 0] * weights).sum()
    if entropy_weights is not None:
        loss = loss + (entropy * entropy_weights).sum()
    (wanted,) = torch.autograd.grad(loss, z)
    normalizer = torch.logsumexp(by_the_formula(logits, scale, cap), -1)
    for way in (head.differentiate, head.fused_differentiate):
        got = way(logits.clone(), targets, (normalizer, entropy.detach().float()), (weights, entropy_weights), scale,
                  cap)
        torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: elsewhere nothing is compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_on_a_gpu_it_gives_what_it_gives_on_a_cpu(dtype: torch.dtype) -> None:
    """Chunks of different sizes, the last one smaller; log-probs, entropies and all gradients."""
    torch.manual_seed(0)
    results = []
    plain = torch.nn.Linear(64, 1000, bias=True).to(dtype)
    hidden, rows = (3 * torch.randn(70, 64)).to(dtype), torch.arange(69)
    targets = torch.randint(1000, (69,))
    for device in ("cpu", "cuda"):
        linear = torch.nn.Linear(64, 1000, bias=True).to(dtype)
        linear.load_state_dict(plain.state_dict())
        linear.to(device)
        made = head.put_in_place(linear, form=head.HeadForm(2.0), chunk_tokens=32)
        inputs = hidden.detach().to(device).requires_grad_()
        logprobs, entropy = made(inputs, rows.to(device), targets.to(device), 0.7, True)
        (logprobs.sum() + 0.1 * entropy.sum()).backward()
        results.append([t.detach().double().cpu() for t in (logprobs, entropy, inputs.grad, made.weight.grad,
                                                            made.bias.grad)])
    for cpu, gpu in zip(*results, strict=True):
        assert (cpu - gpu).norm() < (1e-4 if dtype == torch.float32 else 2e-2) * cpu.norm()


@pytest.mark.all  # GPUs alone run what is compiled
def test_where_it_is_compiled_sizes_change_and_nothing_else_does(monkeypatch) -> None:
    """What GPUs run, through the compiler that processors have: a first size, others, one row, the entropy trained."""
    if shutil.which("g++") is None or not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("nothing to compile with here")
    compiled = (torch.compile(head.fused_measure), torch.compile(head.fused_differentiate))
    torch.manual_seed(0)
    linear = head.put_in_place(torch.nn.Linear(16, 100), form=head.HeadForm(2.0), chunk_tokens=8)
    results = []
    for passes in (lambda rows: compiled if len(rows) > 1 else (head.measure, head.differentiate),
                   lambda rows: (head.measure, head.differentiate)):
        monkeypatch.setattr(head, "_passes", passes)
        torch.manual_seed(1)
        results.append([])
        for num_rows in (20, 17, 13):
            for entropy_coef in (0.1, 0.0):
                hidden = torch.randn(num_rows + 1, 16, requires_grad=True)
                logprobs, entropy = linear(hidden, torch.arange(num_rows), torch.randint(100, (num_rows,)), 0.7, True)
                weight_grad, = torch.autograd.grad(logprobs.sum() + entropy_coef * entropy.sum(), linear.weight)
                results[-1] += [logprobs.detach(), entropy.detach(), weight_grad]
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
