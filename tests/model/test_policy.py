"""Log-probs and entropy equal those of transformers' own full logits, values and gradients, in every layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flux_ray.batch import make_micro_batch, without_weight
from flux_ray.model import load_policy
from flux_ray.records import Sample
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit
TEMPERATURE = 0.7


def ragged_samples(seed: int = 0, vocab: int = 64) -> list[Sample]:
    rng = np.random.default_rng(seed)
    samples = []
    for length, prompt in ((9, 3), (4, 1), (14, 6), (2, 1), (7, 5)):
        mask = np.arange(length) >= prompt
        mask[prompt + 1 : prompt + 2] &= length < 14  # a token inside the long response that nobody sampled
        samples.append(Sample(rng.integers(3, vocab, length).astype(np.int32), mask, mask.astype(np.float32)))
    return samples


def by_transformers(hf: torch.nn.Module, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same numbers the plain way: one sequence at a time, whole logits."""
    logprobs, entropies = [], []
    for sample in samples:
        ids = torch.from_numpy(sample.token_ids).long()[None]
        log_p = torch.log_softmax(hf(input_ids=ids).logits[0].float() / TEMPERATURE, dim=-1)
        mask = torch.from_numpy(sample.loss_mask)[1:]
        logprobs.append(log_p[:-1].gather(1, ids[0, 1:, None])[:, 0][mask])
        entropies.append(-(log_p.exp() * log_p).sum(-1)[:-1][mask])
    return torch.cat(logprobs), torch.cat(entropies)


def gradients(module: torch.nn.Module, logprobs: torch.Tensor, entropy: torch.Tensor) -> dict[str, torch.Tensor]:
    weights = torch.linspace(-1, 1, len(logprobs))
    module.zero_grad()
    ((logprobs * weights).sum() + (entropy * weights.flip(0)).sum()).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["padded", "block_diagonal"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("chunk_tokens", [4, 1024])
def test_values_and_gradients(tmp_path, layout: str, tied: bool, chunk_tokens: int) -> None:
    path = tiny_model(tmp_path, tied=tied)
    samples = ragged_samples()
    hf = AutoModelForCausalLM.from_pretrained(path)
    wanted_logprobs, wanted_entropy = by_transformers(hf, samples)
    wanted = gradients(hf, wanted_logprobs, wanted_entropy)

    policy = load_policy(path, dtype=torch.float32, layout=layout, chunk_tokens=chunk_tokens)
    micro_batch = make_micro_batch(samples, sample_ids=range(len(samples)))
    logprobs_S, entropy_S = policy(micro_batch, temperature=TEMPERATURE, with_entropy=True)
    mask_S = micro_batch.loss_mask_S
    assert not logprobs_S[~mask_S].any() and not entropy_S[~mask_S].any()
    torch.testing.assert_close(logprobs_S[mask_S], wanted_logprobs, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropy_S[mask_S], wanted_entropy, atol=1e-5, rtol=0)
    got = gradients(policy.hf, logprobs_S[mask_S], entropy_S[mask_S])
    assert got.keys() == wanted.keys()
    whole = torch.cat([g.flatten() for g in wanted.values()])
    gap = torch.cat([(got[name] - wanted[name]).flatten() for name in wanted])
    assert gap.norm() / whole.norm() < 1e-5


def test_head_with_bias_and_no_entropy(tmp_path) -> None:
    from flux_ray.model.head import HeadForm, put_in_place

    torch.manual_seed(1)
    head = torch.nn.Linear(16, 40, bias=True).double()
    hidden = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    rows, targets, weights = torch.tensor([0, 2, 5]), torch.tensor([7, 0, 39]), torch.tensor([1.0, -2.0, 0.5])
    log_p = torch.log_softmax(head(hidden) * 3 / TEMPERATURE, -1)[rows, targets]
    wanted = torch.autograd.grad((log_p * weights).sum(), [hidden, head.weight, head.bias])
    put_in_place(head, form=HeadForm(3.0), chunk_tokens=2)
    got_log_p, entropy = head(hidden, rows, targets, TEMPERATURE, False)
    torch.testing.assert_close(got_log_p.double(), log_p, atol=1e-5, rtol=0)
    assert not entropy.any()
    for got, want in zip(torch.autograd.grad((got_log_p * weights).sum(), [hidden, head.weight, head.bias]), wanted,
                         strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_micro_batch_without_loss_tokens_still_runs_backward(tmp_path) -> None:
    policy = load_policy(tiny_model(tmp_path, tied=False), dtype=torch.float32, layout="padded", chunk_tokens=8)
    micro_batch = without_weight()
    logprobs_S, _ = policy(micro_batch, temperature=1.0, with_entropy=False)
    logprobs_S.sum().backward()
    grads = [p.grad for p in policy.parameters()]
    assert all(g is not None and not g.any() for g in grads)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, checkpointing: bool) -> None:
    path = tiny_model(tmp_path, tied=True)
    micro_batch = make_micro_batch(ragged_samples(), sample_ids=range(5))
    norms = []
    for on in (False, checkpointing):
        policy = load_policy(path, dtype=torch.float32, layout="padded", chunk_tokens=8, gradient_checkpointing=on)
        policy.train()
        policy(micro_batch, temperature=1.0, with_entropy=False)[0].sum().backward()
        norms.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    torch.testing.assert_close(norms[0], norms[1], atol=1e-6, rtol=1e-5)
