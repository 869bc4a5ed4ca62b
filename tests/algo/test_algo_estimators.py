import numpy as np
import oracle
import pytest
import torch

from flux_ray import algo
from flux_ray.algo.estimators import ESTIMATORS
from flux_ray.config import AlgoConfig
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

NAMES = ["grpo", "grpo_vectorized", "dr_grpo", "rloo", "reinforce", "reinforce_pp", "reinforce_pp_baseline"]


def ragged(seed, *, num_groups=5, group_size=4, length=7, equal=False):
    """Rewards at the last loss token of ragged rows (one of them empty, one with a hole), group ids, and log-probs."""
    rng = np.random.default_rng(seed)
    rows = num_groups * group_size
    ends = rng.integers(1, length + 1, rows)
    mask = np.arange(length) < ends[:, None]
    mask[rows // 2] = False
    widest = int(ends.argmax())
    mask[widest, ends[widest] // 2] = False
    rewards = np.zeros((rows, length))
    rewards[np.arange(rows), ends - 1] = 0.3 if equal else rng.normal(1.0, 2.0, rows)
    index = np.repeat(np.arange(num_groups) + 10, group_size)
    return rewards, mask, index, rng.normal(-2, 1, (rows, length)), rng.normal(-2, 1, (rows, length))


def ours(name, rewards, mask, index, *, group_size=4, **kw):
    config = AlgoConfig(name="grpo", estimator=name, normalize_by_std=kw.pop("normalize", True),
                        kl_coef=kw.pop("kl_coef", 0.0))
    kw = {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in kw.items()}
    return algo.compute_advantages(
        algo.resolve(config), token_level_rewards=torch.from_numpy(rewards), response_mask=torch.from_numpy(mask),
        index=torch.from_numpy(index), config=config, group_size=group_size, **kw)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_as_the_oracle(name, seed, kl_coef):
    rewards, mask, index, old, reference = ragged(seed)
    got, _ = ours(name, rewards, mask, index, kl_coef=kl_coef, old_logprobs=old, reference_logprobs=reference)
    want = oracle.advantages(name, rewards, mask, index, kl_coef=kl_coef, old=old, reference=reference)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-9)
    assert np.abs(want).max() > 0.1


@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized"])
def test_without_std(name):
    rewards, mask, index, *_ = ragged(3)
    got, _ = ours(name, rewards, mask, index, normalize=False)
    np.testing.assert_allclose(got.numpy(), oracle.advantages("dr_grpo", rewards, mask, index), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized", "dr_grpo", "rloo", "reinforce_pp_baseline"])
@pytest.mark.parametrize("case", ["equal", "group of one", "equal float32"])
def test_nothing_to_learn_is_exactly_zero(name, case):
    size = 1 if case == "group of one" else 3
    rewards, mask, index, *_ = ragged(4, num_groups=4, group_size=size, equal=case != "group of one")
    rewards = rewards.astype(np.float32) if case == "equal float32" else rewards
    got, returns = ours(name, rewards, mask, index, group_size=size)
    assert (got == 0).all() and (returns == 0).all()
    assert got.dtype == torch.from_numpy(rewards).dtype


def test_whitening_of_equal_returns_is_exactly_zero():
    rewards, mask, index, *_ = ragged(5, equal=True)
    got, returns = ours("reinforce_pp", rewards.astype(np.float32), mask, index)
    assert (got == 0).all() and (returns.numpy()[mask] == np.float32(0.3)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize(("case", "made"), [
    ("one token", {"length": 1}), ("groups of one", {"group_size": 1}), ("equal rewards", {"equal": True}),
    ("one sequence", {"num_groups": 1, "group_size": 1}), ("no loss token", {}),
])
def test_at_the_edges_as_the_oracle(name, kl_coef, case, made):
    """With a KL in the reward, equal rewards differ again."""
    rewards, mask, index, old, reference = ragged(6, **made)
    if case in ("one sequence", "no loss token"):
        mask[:] = case == "one sequence"
    got, _ = ours(name, rewards, mask, index, group_size=made.get("group_size", 4), kl_coef=kl_coef, old_logprobs=old,
                  reference_logprobs=reference)
    want = oracle.advantages(name, rewards, mask, index, kl_coef=kl_coef, old=old, reference=reference)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-9)


def test_vectorized_equals_per_group():
    rewards, mask, index, *_ = ragged(7, num_groups=50, group_size=8)
    for dtype in (np.float32, np.float64):
        loop, _ = ours("grpo", rewards.astype(dtype), mask, index, group_size=8)
        fast, _ = ours("grpo_vectorized", rewards.astype(dtype), mask, index, group_size=8)
        np.testing.assert_allclose(fast, loop, rtol=1e-6 if dtype == np.float32 else 1e-14, atol=0)


def test_vectorized_with_scattered_groups_takes_the_per_group_form():
    rewards, mask, index, *_ = ragged(8)
    index = np.random.default_rng(0).permutation(index)
    got, _ = ours("grpo_vectorized", rewards, mask, index)
    np.testing.assert_allclose(got.numpy(), oracle.advantages("grpo", rewards, mask, index), rtol=0, atol=1e-9)


def test_vectorized_by_hand_needs_no_index():
    """The signature that a plain call with consecutive groups uses."""
    rewards, mask, index, *_ = ragged(9)
    advantages, returns = algo.get_adv_estimator("grpo_vectorized")(
        torch.from_numpy(rewards), torch.from_numpy(mask), group_size=4)
    np.testing.assert_allclose(advantages.numpy(), oracle.advantages("grpo", rewards, mask, index), rtol=0, atol=1e-9)
    assert returns.shape == advantages.shape
    with pytest.raises(UserError, match="19 rows are no whole number of groups of 4"):
        algo.get_adv_estimator("grpo_vectorized")(torch.zeros(19, 2), torch.ones(19, 2))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_without_a_score_leaves_its_group(name):
    rewards, mask, index, *_ = ragged(10)
    unscored = 6
    mask[unscored] = False
    rewards[unscored, 0] = np.nan
    got, returns = ours(name, rewards, mask, index)
    kept = np.arange(len(rewards)) != unscored
    want = oracle.advantages(name, rewards[kept], mask[kept], index[kept])
    np.testing.assert_allclose(got.numpy()[kept], want, rtol=0, atol=1e-9)
    assert (got[unscored] == 0).all() and (returns[unscored] == 0).all()


@pytest.mark.parametrize("name", ["grpo", "grpo_vectorized", "rloo"])
def test_a_masked_truncated_sample_stays_in_its_groups_statistics(name):
    rewards, mask, index, *_ = ragged(11)
    whole, _ = ours(name, rewards, mask, index)
    masked = mask.copy()
    masked[5] = False
    got, _ = ours(name, rewards, masked, index)
    assert (got[5] == 0).all()
    np.testing.assert_array_equal(np.delete(got.numpy(), 5, 0), np.delete(whole.numpy(), 5, 0))


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_whitening_over_ranks_is_one_sum(name):
    """Two ranks, the second of which sees the sum of both; and a third that has no rows but joins the sum."""
    rewards, mask, index, *_ = ragged(12)
    want = oracle.advantages(name, rewards, mask, index)
    parts = [slice(0, 8), slice(8, 20), slice(20, 20)]
    seen = []

    def run(part, reduce):
        return ours(name, rewards[part], mask[part], index[part], reduce=reduce)[0].numpy()

    for part in parts:
        run(part, lambda statistics: seen.append(statistics) or statistics)
    assert len(seen) == len(parts)
    for part in parts:
        np.testing.assert_allclose(run(part, lambda _: sum(seen)), want[part], rtol=0, atol=1e-9)


def test_whitening_keeps_small_differences_of_large_numbers():
    rewards, mask, index, *_ = ragged(13)
    rewards = np.where(rewards != 0, 1000 + 1e-3 * rewards, 0).astype(np.float32)
    got, _ = ours("reinforce_pp", rewards, mask, index)
    want = oracle.advantages("reinforce_pp", rewards, mask, index)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4)


@pytest.fixture
def registry():
    before = dict(ESTIMATORS)
    yield ESTIMATORS
    ESTIMATORS.clear()
    ESTIMATORS.update(before)


def test_a_registered_estimator_is_called_with_the_padded_views(registry):
    seen = {}

    @algo.register_adv_estimator("halved")
    def halved(token_level_rewards, response_mask, factor=1.0, **kw):
        seen.update(kw)
        scores = token_level_rewards.sum(-1, keepdim=True)
        return factor * scores * response_mask, scores + 0 * token_level_rewards

    rewards, mask, index, old, _ = ragged(14)
    config = AlgoConfig(name="halved", options={"factor": 0.5})
    got, returns = algo.compute_advantages(
        algo.resolve(config), token_level_rewards=torch.from_numpy(rewards), response_mask=torch.from_numpy(mask),
        index=torch.from_numpy(index), config=config, group_size=4, old_logprobs=torch.from_numpy(old))
    np.testing.assert_allclose(got.numpy(), 0.5 * rewards.sum(-1, keepdims=True) * mask)
    np.testing.assert_allclose(returns.numpy(), rewards.sum(-1, keepdims=True) * mask)
    assert seen["index"].tolist() == index.tolist() and seen["group_size"] == 4 and seen["values"] is None
    assert seen["old_log_prob"].shape == mask.shape and seen["reference_log_prob"] is None
    assert "halved" in algo.list_adv_estimators() and algo.get_adv_estimator("halved") is halved
    with pytest.raises(ValueError, match="advantage estimator 'halved' is taken"):
        algo.register_adv_estimator("halved")(halved)


@pytest.mark.parametrize(("result", "message"), [
    (lambda r, m: (r[:, :1], r), r"'odd': advantages have shape \(20, 1\), wanted \(20, 7\)"),
    (lambda r, m: (r, r.sum()), r"'odd': returns have shape \(\), wanted \(20, 7\)"),
    (lambda r, m: (r * torch.nan, r), "'odd': advantages hold nan"),
    (lambda r, m: r, r"'odd' gave Tensor, wanted \(advantages, returns\)"),
])
def test_what_a_registered_estimator_may_not_return(registry, result, message):
    algo.register_adv_estimator("odd")(lambda token_level_rewards, response_mask, **kw:
                                       result(token_level_rewards, response_mask))
    rewards, mask, index, *_ = ragged(15)
    with pytest.raises(UserError, match=message):
        ours("odd", rewards, mask, index)


def test_an_unknown_estimator():
    with pytest.raises(UserError, match="unknown advantage estimator 'gppo': did you mean 'grpo'"):
        algo.get_adv_estimator("gppo")


def test_truncated_rows_that_leave_the_loss_pay_their_kl_too():
    """Their score belongs to their group's statistics: it is lessened like that of the others."""
    rewards, mask, index, old, reference = ragged(3)
    masked = mask.copy()
    masked[1] = masked[6] = False
    given = {"kl_coef": 0.3, "old_logprobs": old, "reference_logprobs": reference}
    whole, _ = ours("rloo", rewards, mask, index, **given)
    got, _ = ours("rloo", rewards, masked, index, sampled_mask=mask, **given)
    assert not got[[1, 6]].any()
    others = [row for row in range(len(rewards)) if row not in (1, 6)]
    torch.testing.assert_close(got[others], whole[others])
    unpaid, _ = ours("rloo", rewards, masked, index, **given)
    assert (unpaid[0] - whole[0]).abs().max() > 1e-3
