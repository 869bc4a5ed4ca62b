"""The loss of a step and its gradient don't depend on how the step is cut: one toy policy, many ways to pack."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flux_ray import algo
from flux_ray.batch import StepCounts, divisor, loss_weights, pack, padded_mask, to_padded
from flux_ray.config import AlgoConfig, from_dict, preset
from flux_ray.observability.metrics import merge, read
from flux_ray.records import Sample

pytestmark = pytest.mark.unit

VOCAB = 11


def toy_samples(algorithm, seed=0, count=12):
    rng = np.random.default_rng(seed)
    masks = []
    for i in range(count):
        mask = np.zeros(int(rng.integers(4, 14)), bool)
        mask[int(rng.integers(1, 4)):] = i != 5
        masks.append(mask)
    counts = StepCounts(sum(bool(m.any()) for m in masks), sum(int(m.sum()) for m in masks))
    by = divisor(algorithm.aggregation, counts)
    log = lambda m: rng.normal(-2.4, 0.3, len(m)).astype(np.float32)  # noqa: E731
    return [Sample(
        token_ids=rng.integers(0, VOCAB, len(m)).astype(np.int32), loss_mask=m,
        loss_weights=loss_weights(algorithm.aggregation, loss_mask=m, max_tokens=16) / np.float32(by),
        advantages=np.full(len(m), rng.normal(), np.float32), sampler_logprobs=log(m), reference_logprobs=log(m),
    ) for m in masks]


def step(algorithm, config, micro_batches):
    """Loss, gradient and metrics of a policy with one table of next-token logits per token."""
    table = torch.linspace(-1, 1, VOCAB * VOCAB, dtype=torch.float64).sin().view(VOCAB, VOCAB).requires_grad_()
    total, parts = 0.0, []
    for mb in micro_batches:
        logits = torch.log_softmax(table[mb.token_ids_S.roll(1)], -1)
        log_prob = logits.gather(-1, mb.token_ids_S[:, None])[:, 0] * (mb.position_ids_S > 0)
        view = lambda values, mb=mb: to_padded(values.double(), mb)  # noqa: E731
        loss, metrics = algo.policy_objective(
            algorithm, config, log_prob=view(log_prob),
            old_log_prob=view(log_prob.detach() + 0.1 * mb.sampler_logprobs_S),
            sampler_log_prob=view(mb.sampler_logprobs_S), reference_log_prob=view(mb.reference_logprobs_S),
            entropy=view(-(logits.exp() * logits).sum(-1)), advantages=view(mb.advantages_S),
            response_mask=padded_mask(mb), loss_weights=view(mb.loss_weights_S))
        loss.backward()
        total += loss.item()
        parts.append(metrics)
    return total, table.grad.clone(), read(merge(parts))


@pytest.mark.parametrize("name", algo.ALGORITHMS)
def test_any_packing_gives_the_same_step(name):
    config = replace(from_dict({"algo.name": name} | preset(name)).algo, beta=0.05, entropy_coef=0.02)
    algorithm = algo.resolve(config)
    samples = toy_samples(algorithm)
    whole = step(algorithm, config, pack(samples, max_tokens=10_000, padded=False))
    assert whole[1].abs().max() > 1e-3
    back_to_front = pack(samples[::-1], max_tokens=25, padded=False)
    ways = [
        pack(samples, max_tokens=1, padded=True),
        pack(samples, max_tokens=30, padded=True),
        pack(samples, max_tokens=30, max_samples=2, padded=False),
        back_to_front,
    ]
    for packed in ways:
        assert len(packed) > 2
        loss, gradient, metrics = step(algorithm, config, packed)
        assert loss == pytest.approx(whole[0], rel=1e-12)
        assert (gradient - whole[1]).norm() <= 1e-12 * whole[1].norm()
        assert metrics == pytest.approx(whole[2], rel=1e-12)


def test_weights_over_micro_batches_sum_to_the_steps():
    samples = toy_samples(algo.resolve(AlgoConfig()))
    packed = pack(samples, max_tokens=30, padded=True)
    total = sum(float(mb.loss_weights_S.sum()) for mb in packed)
    assert total == pytest.approx(1, rel=1e-6)
