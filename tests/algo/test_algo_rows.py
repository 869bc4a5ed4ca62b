"""Blocks of rows change nothing, and a known slope is what autograd would have found."""

import pytest
import torch

from flux_ray.algo import rows
from flux_ray.algo.estimators import ESTIMATORS
from flux_ray.algo.losses import POLICY_LOSSES
from flux_ray.config import AlgoConfig

pytestmark = pytest.mark.unit

N, L = 10, 7


@pytest.fixture
def small_blocks(monkeypatch):
    """Three rows a block: the last one is smaller."""
    def switch(on):
        monkeypatch.setattr(rows, "BLOCK_NUMBERS", 3 * L if on else 2**16)

    return switch


def views():
    torch.manual_seed(0)
    old, new, advantages = torch.randn(3, N, L, dtype=torch.float64).unbind()
    mask = torch.arange(L) < torch.tensor([7, 1, 0, 4, 6, 2, 5, 7, 3, 1])[:, None]
    return old, old + 0.3 * new, advantages, mask


def loss_and_gradient(name):
    old, new, advantages, mask = views()
    new.requires_grad_()
    loss, metrics = POLICY_LOSSES[name].function(old, new, advantages, mask, config=AlgoConfig(dual_clip=1.5))
    (gradient,) = torch.autograd.grad((loss * mask).square().sum(), new)
    return [loss.detach(), gradient, *metrics.values()]


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_a_loss_in_blocks(name, small_blocks):
    whole = loss_and_gradient(name)
    small_blocks(True)
    for part, expected in zip(loss_and_gradient(name), whole, strict=True):
        assert part.dtype == expected.dtype and torch.equal(part, expected)


@pytest.mark.parametrize("name", ["reinforce", "reinforce_pp", "reinforce_pp_baseline"])
def test_an_estimator_in_blocks(name, small_blocks):
    _, rewards, _, mask = views()
    results = []
    for on in (False, True):
        small_blocks(on)
        results.append(ESTIMATORS[name].function(rewards * mask, mask, index=torch.arange(N) // 2))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)   # sums over a batch go block by block


@pytest.mark.parametrize("name", ["ppo", "gspo", "rloo", "reinforce"])
def test_a_slope_is_the_derivative(name):
    """By finite differences. (Those of cispo and gspo_token are not, on purpose: the oracle has them.)"""
    old, new, advantages, mask = views()
    loss = POLICY_LOSSES[name].function
    assert torch.autograd.gradcheck(
        lambda x: loss(old, x, advantages, mask, config=AlgoConfig(dual_clip=1.5))[0] * mask, new.requires_grad_())


def test_no_rows_and_no_columns():
    for shape in ((0, 3), (4, 0)):
        empty = torch.zeros(shape)
        (result,) = rows.by_rows(lambda x: (x + 1,), empty)
        assert result.shape == shape
