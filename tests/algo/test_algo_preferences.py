"""The objectives on pairs against their papers in NumPy; what is measured; which options are theirs."""

from __future__ import annotations

import numpy as np
import pair_oracle as oracle
import pytest
import torch

from flux_ray.algo import needs_reference
from flux_ray.algo.preferences import LOSSES, METRICS, preference_objective, score_objective
from flux_ray.config import (
    OBJECTIVES,
    AlgoConfig,
    CDPOAlgoConfig,
    IPOAlgoConfig,
    PairsAlgoConfig,
    PairsConfig,
    PolicyGradientConfig,
    RewardModelAlgoConfig,
    SFTAlgoConfig,
    objective_of,
)
from flux_ray.observability.metrics import merge, read

pytestmark = pytest.mark.unit

SIZE = 7
CASES = {
    "dpo": ("dpo", {}, {}),
    "dpo, a sharper beta": ("dpo", {"beta": 0.7}, {}),
    "dpo without a reference": ("dpo", {"reference_free": True}, {}),
    "cdpo": ("cdpo", {"label_smoothing": 0.1}, {"epsilon": 0.1}),
    "cdpo, half wrong": ("cdpo", {"label_smoothing": 0.5}, {"epsilon": 0.5}),
    "ipo": ("ipo", {"pair_logprobs": "mean"}, {"mean": True}),
    "ipo of sums": ("ipo", {"pair_logprobs": "sum"}, {}),
}


def batch_of(seed):
    rng = np.random.default_rng(seed)
    logprobs = rng.normal(-30, 8, (SIZE, 2))
    return {"logprobs": logprobs, "reference": logprobs + rng.normal(0, 4, (SIZE, 2)),
            "num_tokens": rng.integers(1, 30, (SIZE, 2))}


def ours(name, batch, options, *, num_pairs=SIZE):
    config = {"dpo": PairsAlgoConfig, "ipo": IPOAlgoConfig, "cdpo": CDPOAlgoConfig}[name](**{"beta": 0.1, **options})
    logprobs = torch.from_numpy(batch["logprobs"]).requires_grad_()
    reference = None if config.reference_free else torch.from_numpy(batch["reference"])
    loss, metrics = preference_objective(config, logprobs=logprobs, reference_logprobs=reference,
                                         num_tokens=torch.from_numpy(batch["num_tokens"]), num_pairs=num_pairs)
    loss.backward()
    return loss.item(), logprobs.grad.numpy(), metrics


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_as_the_oracle(case, seed):
    name, options, theirs = CASES[case]
    batch = batch_of(seed)
    settings = {"reference": None if options.get("reference_free") else batch["reference"],
                "num_tokens": batch["num_tokens"], "beta": options.get("beta", 0.1), **theirs}
    value, gradient, _ = ours(name, batch, options)
    assert value == pytest.approx(oracle.loss(name, batch["logprobs"], **settings), abs=1e-9)
    np.testing.assert_allclose(gradient, oracle.gradient(name, batch["logprobs"], **settings), rtol=0, atol=1e-9)
    assert np.abs(gradient).max() > 0.5e-3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bradley_terry_as_the_oracle(seed):
    rng = np.random.default_rng(seed)
    scores, margins = rng.normal(0, 2, (SIZE, 2)), rng.uniform(0, 1, SIZE)
    given = torch.from_numpy(scores).requires_grad_()
    loss, metrics = score_objective(scores=given, margins=torch.from_numpy(margins), num_pairs=SIZE)
    loss.backward()
    assert loss.item() == pytest.approx(oracle.loss("reward_model", scores, margins=margins), abs=1e-9)
    slope = oracle.gradient("reward_model", scores, margins=margins)
    np.testing.assert_allclose(given.grad.numpy(), slope, rtol=0, atol=1e-9)
    assert read(metrics)["pairs/margin"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean())


def test_far_pairs_stay_finite():
    far = {"logprobs": np.array([[-4e4, 0.0], [0.0, -4e4]]), "reference": np.zeros((2, 2)),
           "num_tokens": np.ones((2, 2), int)}
    for name, options in (("dpo", {}), ("cdpo", {"label_smoothing": 0.1})):
        value, gradient, _ = ours(name, far, {"beta": 1.0, **options}, num_pairs=2)
        assert np.isfinite(value) and np.isfinite(gradient).all()


def test_metrics_by_hand():
    logprobs, reference = np.array([[-3.0, -5.0], [-4.0, -2.0], [-1.0, -1.0]]), np.array([[-4.0, -5.0], [-4.0, -4.0],
                                                                                          [-1.0, -1.0]])
    batch = {"logprobs": logprobs, "reference": reference, "num_tokens": np.ones((3, 2), int)}
    _, _, metrics = ours("dpo", batch, {"beta": 0.5})
    values = read(metrics)
    assert set(values) == {one.name for one in METRICS}
    assert values["pairs/chosen_reward"] == pytest.approx(0.5 * (1 + 0 + 0) / 3)
    assert values["pairs/rejected_reward"] == pytest.approx(0.5 * (0 + 2 + 0) / 3)
    assert values["pairs/margin"] == pytest.approx(0.5 * (1 - 2 + 0) / 3)
    assert values["pairs/accuracy"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_parts_of_a_step_add_up():
    batch = batch_of(4)
    whole, gradient, metrics = ours("dpo", batch, {})
    parts = [ours("dpo", {key: value[rows] for key, value in batch.items()}, {}) for rows in (slice(0, 3), slice(3, 7))]
    assert sum(value for value, *_ in parts) == pytest.approx(whole, abs=1e-12)
    np.testing.assert_allclose(np.concatenate([slope for _, slope, _ in parts]), gradient, atol=1e-12)
    merged = read(merge([measured for *_, measured in parts]))
    assert merged == pytest.approx(read(metrics), abs=1e-12)


def test_who_needs_a_reference():
    assert set(LOSSES) == {name for name, cls in OBJECTIVES.items() if issubclass(cls, PairsConfig)}
    assert needs_reference(PairsAlgoConfig()) and not needs_reference(PairsAlgoConfig(reference_free=True))
    assert not needs_reference(SFTAlgoConfig()) and not needs_reference(RewardModelAlgoConfig())
    assert needs_reference(AlgoConfig()) and not needs_reference(AlgoConfig(beta=0.0))
    assert objective_of("mine") is PolicyGradientConfig
