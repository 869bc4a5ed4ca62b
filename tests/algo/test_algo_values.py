"""GAE against a brute-force double sum, the clipped value loss against NumPy, both in float64."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import torch
from test_algo_estimators import ragged

from flux_ray import algo
from flux_ray.config import PPOAlgoConfig, check_values, from_dict
from flux_ray.errors import UserError
from flux_ray.observability.metrics import merge, read

pytestmark = pytest.mark.unit


def brute_force(rewards, mask, values, *, gamma, lam):
    """A_t = Σ_{k≥t} (γλ)^{k−t} (r_k + γ·V_{k+1} − V_k) over the loss tokens of a row, each sum written out."""
    result = np.zeros(rewards.shape)
    for row, tokens in enumerate(np.flatnonzero(m) for m in mask):
        for i in range(len(tokens)):
            for k in range(i, len(tokens)):
                following = values[row, tokens[k + 1]] if k + 1 < len(tokens) else 0.0
                error = rewards[row, tokens[k]] + gamma * following - values[row, tokens[k]]
                result[row, tokens[i]] += (gamma * lam) ** (k - i) * error
    return result


def gae(rewards, mask, index, values, *, kl_coef=0.0, old=None, reference=None, **settings):
    config = PPOAlgoConfig(kl_coef=kl_coef, **settings)
    made = {"old_logprobs": old, "reference_logprobs": reference, "values": values}
    tensors = {name: None if array is None else torch.from_numpy(array) for name, array in made.items()}
    advantages, returns = algo.compute_advantages(
        algo.resolve(config), token_level_rewards=torch.from_numpy(rewards), response_mask=torch.from_numpy(mask),
        index=torch.from_numpy(index), config=config, group_size=4, **tensors)
    return advantages.numpy(), returns.numpy()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0), (0.0, 0.5)])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("whiten", [False, True])
def test_gae_is_the_double_sum(gamma, lam, kl_coef, whiten):
    """Rows with a hole inside (a tool's tokens, whatever values stand there) and an empty one among them."""
    rewards, mask, index, old, reference = ragged(1)
    values = np.random.default_rng(2).normal(size=rewards.shape)
    paid = rewards - kl_coef * np.where(mask, old - reference, 0)
    want = brute_force(paid, mask, values, gamma=gamma, lam=lam)
    wanted_returns = np.where(mask, want + values, 0)
    if whiten:
        tokens = want[mask]
        want = np.where(mask, (want - tokens.mean()) / (tokens.std() + oracle.EPS_STD), 0)
    advantages, returns = gae(rewards, mask, index, values, kl_coef=kl_coef, old=old, reference=reference,
                              gamma=gamma, gae_lambda=lam, whiten_advantages=whiten)
    np.testing.assert_allclose(advantages, want, rtol=0, atol=1e-9)
    np.testing.assert_allclose(returns, wanted_returns, rtol=0, atol=1e-9)


def test_without_discount_the_return_is_the_score():
    rewards, mask, index, *_ = ragged(3)
    values = np.random.default_rng(4).normal(size=rewards.shape)
    _, returns = gae(rewards, mask, index, values, gae_lambda=1.0)
    np.testing.assert_allclose(returns, np.where(mask, rewards.sum(-1, keepdims=True), 0), rtol=0, atol=1e-9)


def test_a_sample_without_a_score_has_no_advantage_and_no_return():
    rewards, mask, index, *_ = ragged(5)
    rewards[6], mask[6] = np.nan, False
    values = np.random.default_rng(6).normal(size=rewards.shape)
    advantages, returns = gae(rewards, mask, index, values, whiten_advantages=False)
    kept = np.arange(len(rewards)) != 6
    want = brute_force(rewards[kept], mask[kept], values[kept], gamma=1.0, lam=0.95)
    np.testing.assert_allclose(advantages[kept], want, rtol=0, atol=1e-9)
    assert not advantages[6].any() and not returns[6].any()


def numpy_value_loss(value, old, wanted, clip_range):
    clipped = oracle.clip(value, old - clip_range, old + clip_range)
    return oracle.larger((value - wanted) ** 2, (clipped - wanted) ** 2) / 2


#: value, old value, return ► is the clipped term the larger one (then it has no slope)
CASES = [
    (0.5, 0.0, 1.0, True),     # left upwards, towards the return: stops at old + 0.2
    (-0.5, 0.0, -1.0, True),   # the same downwards
    (0.5, 0.0, 0.1, False),    # left upwards, past the return: its own error is the larger
    (-0.5, 0.0, -0.1, False),
    (0.5, 0.0, -1.0, False),   # left upwards, away from the return
    (-0.5, 0.0, 1.0, False),
    (0.1, 0.0, 1.0, False),    # inside
]


@pytest.mark.parametrize(("value", "old", "wanted", "clipped"), CASES)
def test_values_are_clipped_at_either_side(value, old, wanted, clipped):
    v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    others = {name: torch.tensor(x, dtype=torch.float64) for name, x in (("old_values", old), ("returns", wanted))}
    loss, was = algo.value_loss(v, **others, clip_range=0.2)
    loss.backward()
    moved = value + 1j * oracle.STEP
    assert loss.item() == pytest.approx(numpy_value_loss(value, old, wanted, 0.2), abs=1e-9)
    assert v.grad.item() == pytest.approx(np.imag(numpy_value_loss(moved, old, wanted, 0.2)) / oracle.STEP, abs=1e-9)
    assert bool(was) == clipped and (v.grad == 0) == clipped


def test_the_objective_as_the_oracle_however_it_is_split():
    rng = np.random.default_rng(0)
    values, old, wanted = (rng.normal(size=(6, 9)) for _ in range(3))
    mask = rng.random((6, 9)) < 0.7
    weights = mask / mask.sum()
    want = np.zeros(values.shape)
    total = 0.0
    for place in zip(*np.nonzero(mask), strict=True):
        total += weights[place] * numpy_value_loss(values[place], old[place], wanted[place], 0.5)
        moved = numpy_value_loss(values[place] + 1j * oracle.STEP, old[place], wanted[place], 0.5)
        want[place] = weights[place] * np.imag(moved) / oracle.STEP
    leaf = torch.from_numpy(values).requires_grad_()
    measured = []
    for rows in (slice(0, 2), slice(2, 6)):
        others = {"old_values": old, "returns": wanted, "mask": mask, "loss_weights": weights}
        loss, metrics = algo.value_objective(
            leaf[rows], clip_range=0.5, **{k: torch.from_numpy(v[rows]) for k, v in others.items()})
        loss.backward()
        measured.append(metrics)
    np.testing.assert_allclose(leaf.grad.numpy(), want, rtol=0, atol=1e-9)
    metrics = read(merge(measured))
    assert metrics["critic/loss"] == pytest.approx(total, abs=1e-9)
    assert metrics["critic/value_mean"] == pytest.approx(old[mask].mean(), abs=1e-9)
    assert metrics["critic/return_mean"] == pytest.approx(wanted[mask].mean(), abs=1e-9)
    explained = 1 - np.var(wanted[mask] - old[mask]) / np.var(wanted[mask])
    assert metrics["critic/explained_variance"] == pytest.approx(explained, abs=1e-9)
    assert 0 < metrics["critic/clip_frac"] < 1 and set(metrics) <= {one.name for one in algo.METRICS}


def test_what_ppo_is_made_of():
    ppo = algo.resolve(PPOAlgoConfig())
    assert (ppo.estimator, ppo.policy_loss, ppo.aggregation) == ("gae", "ppo", "token_mean")
    assert ppo.needs_critic and ppo.needs_whole_batch and not ppo.needs_groups
    assert not algo.resolve(PPOAlgoConfig(whiten_advantages=False)).needs_whole_batch


@pytest.mark.parametrize(("changed", "message"), [
    ({"algo.gamma": 0.9}, r"algo\.gamma=0\.9 is read by ppo alone, not by grpo"),
    ({"algo.whiten_advantages": False}, r"algo\.whiten_advantages=False is read by ppo alone"),
    ({"critic.learning_rate": 1e-4}, r"critic\.learning_rate=0\.0001 is read by ppo alone, not by grpo"),
    ({"algo.name": "ppo", "critic.warmup_steps": 100}, r"critic\.warmup_steps=100 must be < driver\.num_steps=100"),
])
def test_what_nothing_reads_is_refused(changed, message):
    from flux_ray.algo.check import check

    with pytest.raises(UserError, match=message):
        check(check_values(from_dict(changed)))
    check(from_dict({"algo.name": "ppo", "algo.gamma": 0.9, "critic.warmup_steps": 3}))


def test_explained():
    from flux_ray.algo.explain import explain
    from flux_ray.config import preset

    told = dict(explain(from_dict({**preset("ppo"), "critic.warmup_steps": 3, "algo.gamma": 0.5})))
    assert told["advantage A"].startswith("Σ_{k≥0} (0.5·0.95)^k·δ_{t+k}, whitened")
    assert "clip(V, V_old ± 0.2)" in told["critic"]
    assert "from the policy's start" in told["critic"] and "the first 3 steps train it alone" in told["critic"]
    assert "weight 0.05" in told["KL"]
