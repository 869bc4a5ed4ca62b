from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch

from flux_ray import algo
from flux_ray.algo.losses import POLICY_LOSSES
from flux_ray.batch import StepCounts
from flux_ray.batch.weights import AGGREGATIONS
from flux_ray.config import AlgoConfig
from flux_ray.errors import UserError
from flux_ray.observability.metrics import Max, Sum, read

pytestmark = pytest.mark.unit

S = oracle.Settings
MAX_TOKENS = 8

#: the objectives of the algorithms and of their options: name of the algorithm, settings of the oracle
CASES = {
    "grpo": ("grpo", S(beta=0.04, entropy_coef=0.01)),
    "grpo k2": ("grpo", S(beta=0.04, kl="k2")),
    "grpo dual clip": ("grpo", S(dual=1.5)),
    "grpo tis": ("grpo", S(beta=0.04, off_policy="tis", cap=1.5)),
    "grpo icepop": ("grpo", S(off_policy="icepop", band=(0.7, 1.8))),
    "grpo tis sequence": ("grpo", S(off_policy="tis", level="sequence", entropy_coef=0.02)),
    "dr_grpo": ("dr_grpo", S(aggregation="constant_length")),
    "dapo": ("dapo", S(aggregation="token_mean", high=0.28)),
    "gspo": ("gspo", S(loss="gspo", aggregation="sequence", low=3e-2, high=4e-2)),
    "gspo icepop": ("gspo", S(loss="gspo", aggregation="sequence", off_policy="icepop", level="sequence")),
    "gspo_token": ("gspo_token", S(loss="gspo_token", aggregation="sequence", low=3e-2, high=4e-2)),
    "rloo": ("rloo", S(loss="rloo", aggregation="sequence")),
    "rloo tis": ("rloo", S(loss="rloo", aggregation="sequence", off_policy="tis", level="sequence")),
    "reinforce": ("reinforce", S(loss="reinforce", aggregation="token_mean")),
    "reinforce_pp": ("reinforce_pp", S(aggregation="token_mean")),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", S(aggregation="token_mean", beta=0.01, kl="k2")),
    "cispo": ("cispo", S(loss="cispo", aggregation="token_mean", high=0.3)),
}


def config_of(name, settings, **more):
    return AlgoConfig(
        name=name, clip_range=settings.low, clip_range_high=settings.high, dual_clip=settings.dual, beta=settings.beta,
        kl_estimator=settings.kl, entropy_coef=settings.entropy_coef, off_policy=settings.off_policy,
        off_policy_level=settings.level, tis_cap=settings.cap, icepop_low=settings.band[0],
        icepop_high=settings.band[1], **more)


def batch_of(seed, *, rows=6, length=5, per_token=False):
    """Random ragged views with an empty row, a row of one token and one with a hole; advantages of both signs."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(2, length + 1, rows)
    ends[0], ends[1], ends[2] = 0, 1, length
    mask = np.arange(length) < ends[:, None]
    mask[2, 1] = False
    log_prob = rng.normal(-1.5, 0.6, mask.shape)
    near = lambda spread: log_prob + rng.normal(0, spread, mask.shape)  # noqa: E731
    return {
        "log_prob": log_prob, "old": near(0.25), "sampler": near(0.4), "reference": near(0.5),
        "entropy": rng.uniform(0, 2, mask.shape), "mask": mask,
        "advantages": rng.normal(0, 1, mask.shape if per_token else (rows, 1)) * np.ones(mask.shape),
    }


def weights_of(aggregation, mask):
    counts = StepCounts(int(mask.any(-1).sum()), int(mask.sum()))
    chosen = AGGREGATIONS[aggregation]
    rows = [chosen.token(max(int(row.sum()), 1), MAX_TOKENS) / chosen.divisor(counts) * row for row in mask]
    return np.stack(rows)


def ours(name, config, batch, weights, **absent):
    views = {key: torch.from_numpy(value) for key, value in batch.items()}
    log_prob = views["log_prob"].clone().requires_grad_()
    loss, metrics = algo.policy_objective(
        algo.resolve(config), config, log_prob=log_prob, old_log_prob=absent.get("old", views["old"]),
        sampler_log_prob=views["sampler"], reference_log_prob=absent.get("reference", views["reference"]),
        entropy=absent.get("entropy", views["entropy"]), advantages=views["advantages"],
        response_mask=views["mask"], loss_weights=torch.from_numpy(weights))
    loss.backward()
    return loss.item(), log_prob.grad.numpy(), metrics


def theirs(settings, batch, **changed):
    inputs = {**batch, **changed}
    return oracle.loss(settings, **inputs), oracle.gradient(settings, **inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_value_and_gradient_as_the_oracle(case, seed):
    name, settings = CASES[case]
    batch = batch_of(seed, per_token=not algo.ALGORITHMS[name].sequence_level or name == "gspo_token")
    weights = weights_of(algo.ALGORITHMS[name].aggregation, batch["mask"])
    value, gradient, _ = ours(name, config_of(name, settings), batch, weights)
    want, want_gradient = theirs(settings, batch)
    assert value == pytest.approx(want, abs=1e-9)
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=1e-9)
    assert np.abs(want_gradient).max() > 1e-3
    assert algo.ALGORITHMS[name].aggregation == settings.aggregation


#: rows of a batch at its edges: (loss tokens of each, sign of their advantages)
EDGES = {
    "A above 0": ([5, 3, 2], 1.0), "A below 0": ([5, 3, 2], -1.0), "equal rewards, or a group of one": ([5, 3, 2], 0.0),
    "one token": ([1, 1, 1], 1.0), "one sequence": ([4], -1.0), "empty responses": ([0, 3, 0], 1.0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("edge", EDGES)
def test_at_the_edges_as_the_oracle(case, edge):
    (name, settings), (lengths, sign) = CASES[case], EDGES[edge]
    batch = {key: value[: len(lengths)] for key, value in batch_of(12).items()}
    batch["mask"] = np.arange(5) < np.array(lengths)[:, None]
    batch["advantages"] = sign * np.abs(batch["advantages"])
    value, gradient, _ = ours(name, config_of(name, settings), batch, weights_of(settings.aggregation, batch["mask"]))
    want, want_gradient = theirs(settings, batch)
    assert value == pytest.approx(want, abs=1e-9)
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_one_update_has_ratio_one_and_the_right_gradient(case):
    name, settings = CASES[case]
    batch = batch_of(3)
    weights = weights_of(settings.aggregation, batch["mask"])
    value, gradient, metrics = ours(name, config_of(name, settings), batch, weights, old=None)
    want, want_gradient = theirs(settings, batch, old=None)
    assert value == pytest.approx(want, abs=1e-9)
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=1e-9)
    values = read(metrics)
    assert values["actor/ratio_mean"] == 1 and values["actor/old_kl"] == 0 and values.get("actor/clip_frac", 0) == 0


def test_old_logprobs_of_the_sampler():
    batch = batch_of(4)
    config = config_of("grpo", S(), old_logprobs="sampler")
    value, gradient, _ = ours("grpo", config, batch, weights_of("sequence_mean", batch["mask"]), old=None)
    want, want_gradient = theirs(S(), batch, old=batch["sampler"])
    assert value == pytest.approx(want, abs=1e-9)
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=1e-9)


@pytest.mark.parametrize("loss", ["ppo", "gspo", "gspo_token", "rloo", "cispo", "reinforce"])
def test_far_log_probs_stay_finite(loss):
    """Log-ratios beyond ±20 are clamped before exp: nothing overflows, in the value or in the gradient."""
    batch = batch_of(5, per_token=True)
    batch["log_prob"][3:] += 300
    batch["reference"][4:] += 900
    settings = S(loss=loss, beta=0.1)
    config = config_of("grpo", settings, policy_loss=loss)
    value, gradient, _ = ours("grpo", config, batch, weights_of("sequence_mean", batch["mask"]))
    want, want_gradient = theirs(settings, batch)
    assert np.isfinite(gradient).all() and value == pytest.approx(want, rel=1e-9)
    np.testing.assert_allclose(gradient, want_gradient, rtol=1e-9, atol=1e-9)


def test_what_lies_outside_the_mask_has_no_say():
    batch = batch_of(6)
    weights = weights_of("sequence_mean", batch["mask"])
    config = config_of("grpo", S(beta=0.1, entropy_coef=0.1, off_policy="tis"))
    value, gradient, metrics = ours("grpo", config, batch, weights)
    spoilt = {key: v if key == "mask" else np.where(batch["mask"], v, np.nan) for key, v in batch.items()}
    value_2, gradient_2, metrics_2 = ours("grpo", config, spoilt, weights)
    assert value == value_2 and metrics == metrics_2
    np.testing.assert_array_equal(gradient, gradient_2)
    assert (gradient[~batch["mask"]] == 0).all()


def test_no_loss_token_at_all():
    batch = batch_of(7)
    batch["mask"][:] = False
    value, gradient, metrics = ours("grpo", config_of("grpo", S(beta=0.1)), batch, np.zeros(batch["mask"].shape))
    assert value == 0 and (gradient == 0).all() and read(metrics) == {"actor/loss": 0.0}


@pytest.mark.parametrize("case", ["grpo", "grpo dual clip", "gspo", "rloo", "cispo", "dapo"])
def test_metrics_by_brute_force(case):
    name, settings = CASES[case]
    batch = batch_of(8, rows=12)
    value, _, metrics = ours(name, config_of(name, settings), batch, weights_of(settings.aggregation, batch["mask"]))
    places = [(n, t) for n, t in np.ndindex(*batch["mask"].shape) if batch["mask"][n, t]]
    pick = lambda key: [batch[key][place] for place in places]  # noqa: E731
    clipped = []
    for n, _t in places:
        row = [t for t in range(batch["mask"].shape[1]) if batch["mask"][n, t]]
        log_ratios = [batch["log_prob"][n, t] - batch["old"][n, t] for t in row]
        if name == "cispo":
            clipped.append(np.exp(log_ratios[row.index(_t)]) > 1 + settings.high)
            continue
        x = {"gspo": np.mean(log_ratios), "rloo": np.sum(log_ratios)}.get(name, log_ratios[row.index(_t)])
        clipped.append(oracle.was_clipped(settings, np.exp(x), batch["advantages"][n, _t]))
    k1 = np.array(pick("log_prob")) - np.array(pick("reference"))
    want = {
        "actor/loss": value,
        "actor/grpo_kl": np.mean([oracle.kl(settings.kl, z, 0.0) for z in k1]),
        "actor/old_kl": np.mean(np.array(pick("old")) - np.array(pick("log_prob"))),
        "actor/clip_frac": np.mean(clipped),
        "actor/entropy": np.mean(pick("entropy")),
        "actor/adv_mean": np.mean(pick("advantages")),
        "actor/adv_std": np.std(pick("advantages")),
        "actor/ratio_mean": np.mean(np.exp(np.array(pick("log_prob")) - np.array(pick("old")))),
    }
    assert read(metrics) == pytest.approx(want, abs=1e-12)
    assert 0 < want["actor/clip_frac"] < 1
    assert set(metrics) <= {one.name for one in algo.METRICS}


def test_metrics_that_were_not_measured_are_absent():
    batch = batch_of(9)
    *_, metrics = ours("grpo", config_of("grpo", S()), batch, weights_of("sequence_mean", batch["mask"]),
                       reference=None, entropy=None)
    assert {one.name for one in algo.METRICS if not one.name.startswith("critic/")} - set(metrics) == {
        "actor/NAME", "actor/grpo_kl", "actor/entropy", "actor/reward_kl", "actor/kl_coef", "weights/logprob_gap_mean",
        "weights/logprob_gap_max"}


def test_the_kl_in_the_reward():
    """Per sequence that has a loss token: the sum over its tokens."""
    rng = np.random.default_rng(1)
    old, reference, mask = rng.normal(size=(4, 5)), rng.normal(size=(4, 5)), rng.random((4, 5)) < 0.6
    mask[2] = False
    metrics = algo.reward_kl(torch.from_numpy(old), torch.from_numpy(reference),
                             response_mask=torch.from_numpy(mask), coef=0.3)
    sums = [sum(old[n, t] - reference[n, t] for t in range(5) if mask[n, t]) for n in (0, 1, 3)]
    assert read(metrics) == pytest.approx({"actor/reward_kl": np.mean(sums), "actor/kl_coef": 0.3})


def test_logprob_gap():
    rng = np.random.default_rng(0)
    mine, sampler, mask = rng.normal(size=50), rng.normal(size=50), rng.random(50) < 0.5
    metrics = algo.logprob_gap(*map(torch.from_numpy, (mine, sampler, mask)))
    gaps = [abs(a - b) for a, b, m in zip(mine, sampler, mask, strict=True) if m]
    want = {"weights/logprob_gap_mean": np.mean(gaps), "weights/logprob_gap_max": max(gaps)}
    assert read(metrics) == pytest.approx(want)
    assert isinstance(metrics["weights/logprob_gap_max"], Max)
    assert algo.logprob_gap(torch.ones(3), torch.ones(3), torch.zeros(3, dtype=torch.bool)) == {}


@pytest.fixture
def registry():
    before = dict(POLICY_LOSSES)
    yield POLICY_LOSSES
    POLICY_LOSSES.clear()
    POLICY_LOSSES.update(before)


def test_a_registered_loss_per_token_and_as_a_scalar(registry):
    @algo.register_policy_loss("plain")
    def plain(old_log_prob, log_prob, advantages, response_mask, scale=1.0, **kw):
        return -scale * torch.exp(log_prob - old_log_prob) * advantages, {"seen": log_prob, "spread": 0.25}

    @algo.register_policy_loss("plain_mean")
    def plain_mean(old_log_prob, log_prob, advantages, response_mask, **kw):
        losses, _ = plain(old_log_prob, log_prob, advantages, response_mask)
        return (losses * response_mask).sum() / response_mask.sum(), {"actor/rows": Sum(float(len(losses)))}

    batch = batch_of(10)
    weights = weights_of("token_mean", batch["mask"])
    settings = S(aggregation="token_mean", low=1e6, high=1e6)  # never clips: the plain loss, by the oracle
    config = replace(config_of("plain", settings), options={"scale": 2.0}, aggregation="token_mean")
    value, gradient, metrics = ours("plain", config, batch, weights)
    want, want_gradient = theirs(settings, batch)
    assert value == pytest.approx(2 * want, abs=1e-9)
    np.testing.assert_allclose(gradient, 2 * want_gradient, rtol=0, atol=1e-9)
    assert read(metrics)["actor/seen"] == pytest.approx(batch["log_prob"][batch["mask"]].mean())
    assert read(metrics)["actor/spread"] == pytest.approx(0.25)

    # A scalar is this micro-batch's mean: its share of the step is the sum of its weights.
    half = {key: value[:3] for key, value in batch.items()}
    value, gradient, metrics = ours("plain_mean", config_of("plain_mean", settings), half, weights[:3])
    half_mean, half_gradient = theirs(settings, half)
    share = half["mask"].sum() / batch["mask"].sum()
    assert value == pytest.approx(half_mean * share, abs=1e-9)
    np.testing.assert_allclose(gradient, half_gradient * share, rtol=0, atol=1e-9)
    assert metrics["actor/rows"] == Sum(3.0)
    with pytest.raises(UserError, match=r"policy loss 'plain_mean' gives a scalar, algo\.off_policy=tis needs"):
        ours("plain_mean", config_of("plain_mean", S(off_policy="tis")), half, weights[:3])
    with pytest.raises(ValueError, match="policy loss 'plain' is taken"):
        algo.register_policy_loss("plain")(plain)
    assert {"plain", "plain_mean"} <= set(algo.list_policy_losses()) and algo.get_policy_loss("plain") is plain


@pytest.mark.parametrize(("result", "message"), [
    (lambda x: (x[:, :2], {}), r"'odd': the loss has shape \(6, 2\), wanted \(6, 5\) or a scalar"),
    (lambda x: (x * torch.nan, {}), "'odd': the loss is nan"),
    (lambda x: (x.sum() * torch.nan, {}), "'odd': the loss is nan"),
    (lambda x: x, r"'odd' gave Tensor, wanted \(loss, metrics\)"),
])
def test_what_a_registered_loss_may_not_return(registry, result, message):
    algo.register_policy_loss("odd")(lambda old_log_prob, log_prob, advantages, response_mask, **kw: result(log_prob))
    batch = batch_of(11)
    with pytest.raises(UserError, match=message):
        ours("odd", config_of("odd", S()), batch, weights_of("sequence_mean", batch["mask"]))


def test_an_unknown_loss():
    with pytest.raises(UserError, match="unknown policy loss 'pp0': did you mean 'ppo'"):
        algo.get_policy_loss("pp0")
