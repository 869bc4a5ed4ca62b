import re

import pytest

from flux_ray import algo
from flux_ray.algo.check import check, check_groups
from flux_ray.algo.estimators import ESTIMATORS
from flux_ray.algo.losses import POLICY_LOSSES
from flux_ray.batch import AGGREGATIONS
from flux_ray.config import AlgoConfig, PPOAlgoConfig, as_groups, check_values, from_dict, options, preset
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("name", algo.ALGORITHMS)
def test_every_algorithm_by_its_preset_has_nothing_to_remark(name):
    assert check(from_dict(preset(name))) == []
    assert algo.resolve(AlgoConfig(name=name)).name == name
    assert algo.ALGORITHMS[name].aggregation in AGGREGATIONS


def test_presets_hold_what_the_papers_say():
    """Knobs that differ from the default's, by algorithm, as the papers and the algorithms' table have them."""
    off = {"beta": 0.0, "entropy_coef": 0.0}
    gspo = {**off, "clip_range": 3e-4, "clip_range_high": 4e-4}
    table = {
        "grpo": {}, "grpo_vectorized": {}, "dr_grpo": {**off, "normalize_by_std": False},
        "dapo": {**off, "clip_range_high": 0.28, "mask_truncated": True}, "gspo": gspo, "gspo_token": gspo,
        "rloo": {**off, "kl_coef": 0.05}, "reinforce": off, "reinforce_pp": {**off, "kl_coef": 0.01},
        "reinforce_pp_baseline": {"entropy_coef": 0.0, "kl_estimator": "k2", "beta": 0.01},
        "cispo": {**off, "clip_range_high": 4.0},
        "ppo": {**off, "kl_coef": 0.05, "clip_range": 0.2, "gamma": 1.0, "gae_lambda": 0.95, "whiten_advantages": True},
    }
    assert set(table) == set(algo.ALGORITHMS)
    for name, knobs in table.items():
        config = from_dict({"algo.name": name, **preset(name)}).algo
        assert {key: getattr(config, key) for key in knobs} == knobs, name


def test_flags_follow_the_estimator_and_the_loss():
    resolve = lambda **kw: algo.resolve(AlgoConfig(**kw))  # noqa: E731
    grpo = resolve()
    assert grpo.needs_groups and grpo.ratio_loss and not grpo.needs_whole_batch and not grpo.sequence_level
    assert resolve(mini_batches=2).needs_whole_batch and resolve(epochs=2).needs_whole_batch
    assert resolve(name="reinforce_pp").needs_whole_batch and not resolve(name="reinforce_pp").needs_groups
    assert resolve(name="gspo").sequence_level and not resolve(name="reinforce").ratio_loss
    mixed = resolve(name="dapo", estimator="rloo", policy_loss="gspo", aggregation="sequence")
    assert (mixed.estimator, mixed.policy_loss, mixed.aggregation) == ("rloo", "gspo", "sequence")
    assert mixed.sequence_level


@pytest.mark.parametrize("name", ["drgrpo", "dr-grpo", "dr_grpo"])
def test_one_algorithm_by_three_spellings(name):
    assert algo.resolve(AlgoConfig(name=name)).name == "dr_grpo"


def test_what_several_options_say_together():
    """Truncated responses stay where the soft penalty is their gradient; what was normalised alone isn't again."""
    dapo = preset("dapo")
    assert not algo.masks_truncated(from_dict(dapo))
    assert algo.masks_truncated(from_dict({**dapo, "reward": {"overlong_penalty": 0.0}}))
    assert not algo.masks_truncated(from_dict({}))
    assert algo.estimator_config(from_dict({})).normalize_by_std
    assert not algo.estimator_config(from_dict({"reward.combine": "each"})).normalize_by_std


def test_an_adapted_kl_coef_by_hand():
    """Up by 20 % of n / horizon at most, down as much, still at the target (1909.08593, section 2.2)."""
    adapted = lambda kl: algo.adapted_coef(0.1, kl=kl, target=6.0, num_sequences=100, horizon=1000)  # noqa: E731
    assert adapted(60.0) == pytest.approx(0.1 * (1 + 0.2 * 0.1))
    assert adapted(0.0) == pytest.approx(0.1 * (1 - 0.2 * 0.1))
    assert adapted(6.6) == pytest.approx(0.1 * (1 + 0.1 * 0.1)) and adapted(6.0) == 0.1


def test_which_log_probs_are_needed():
    assert algo.needs_reference(AlgoConfig()) and not algo.needs_reference(AlgoConfig(beta=0.0))
    assert algo.needs_reference(AlgoConfig(beta=0.0, kl_coef=0.1))
    assert not algo.needs_old_logprobs(AlgoConfig())
    assert algo.needs_old_logprobs(AlgoConfig(epochs=2)) and algo.needs_old_logprobs(AlgoConfig(kl_coef=0.1))
    assert not algo.needs_old_logprobs(AlgoConfig(epochs=2, old_logprobs="sampler"))


@pytest.mark.parametrize(("values", "message"), [
    ({"rollout.group_size": 1}, "rollout.group_size must be >= 2 for grpo, got 1"),
    ({"rollout.group_size": 1, "algo.name": "drgrpo"}, "rollout.group_size must be >= 2 for dr_grpo, got 1"),
    ({"algo.name": "grop"}, "unknown algorithm 'grop': did you mean 'grpo'?"),
    ({"algo.estimator": "rlo"}, "unknown advantage estimator 'rlo': did you mean 'rloo'?"),
    ({"algo.policy_loss": "gpso"}, "unknown policy loss 'gpso': did you mean 'gspo'?"),
    ({"algo.kl_estimator": "k1"}, "algo.kl_estimator=k1 has no useful gradient in the loss (algo.beta=0.01)"),
    ({"rollout.top_p": 0.9}, "rollout.top_p=0.9 samples from another distribution"),
    ({"rollout.top_k": 20}, "rollout.top_k=20 samples from another distribution"),
    ({"rollout.min_p": 0.1}, "rollout.min_p=0.1 samples from another distribution"),
    ({"algo.off_policy": "tis", "algo.old_logprobs": "sampler"}, "off_policy=tis beside algo.old_logprobs=sampler"),
    ({"algo.name": "gspo", "algo.off_policy": "icepop"}, "algo.off_policy_level must be sequence for gspo"),
    ({"algo.name": "cispo", "algo.dual_clip": 3.0}, "algo.dual_clip=3.0 is not read by the loss cispo"),
    ({"algo.name": "reinforce", "algo.clip_range": 0.3}, "algo.clip_range=0.3 is not read by the loss reinforce"),
    ({"algo.options": {"alpha": 1}}, "algo.options={'alpha': 1} is for registered functions"),
    ({"algo.tis_cap": 3.0}, "algo.tis_cap=3.0 is read with algo.off_policy=tis alone, which is none"),
    ({"algo.name": "reinforce", "reward.combine": "each", "rollout.group_size": 1}, "combine=each normalises"),
    ({"reward.overlong_tokens": 8}, "reward.overlong_tokens=8 is read with reward.overlong_penalty > 0 alone"),
    ({"reward.overlong_tokens": 8, "reward.overlong_penalty": 1.0, "rollout.max_tokens": 4},
     "reward.overlong_tokens=8 must be <= rollout.max_tokens=4"),
    ({"reward.functions": ["my.py:overlong"], "reward.overlong_penalty": 1.0}, "give it another name"),
    ({"algo.name": "sft", "eval.stop_at": 0.8}, "eval.stop_at=0.8 is read by grpo and its kin, ppo alone"),
    ({"algo.name": "sft", "driver.max_staleness": 1}, "not by sft, which learns from examples and rolls nothing out"),
    ({**preset("dpo"), "driver.streaming": "always"}, "not by dpo, which learns from pairs and rolls nothing out"),
    ({"algo.name": "sft", "filter.oversample": 0.5}, "filter.oversample=0.5 is read by grpo and its kin, ppo alone"),
    ({"algo.name": "sft", "rollout.split_groups": 2}, "rollout.split_groups=2 is read by grpo and its kin, ppo alone"),
    ({"algo.name": "reinforce_pp", "driver.streaming": "always"}, "driver.streaming=always: reinforce_pp needs the"),
    ({"algo.mini_batches": 2, "driver.streaming": "always"}, "driver.streaming=always: grpo needs the whole batch"),
    ({"algo.name": "sft", "algo.clip_range": 0.3}, "algo.clip_range=0.3 is read by grpo and its kin, ppo alone"),
    ({**preset("dpo"), "algo.label_smoothing": 0.2}, "algo.label_smoothing=0.2 is read by cdpo alone, not by dpo"),
    ({**preset("dpo"), "algo.epochs": 2}, "algo.epochs=2 is read by grpo and its kin, ppo alone, not by dpo"),
    ({"algo.name": "ipo", "algo.beta": 0.0}, "algo.beta must be > 0 for ipo"),
    ({**preset("dpo"), "algo.reference_free": True, "reference.path": "r"}, "reference.path=r beside"),
    ({**preset("dpo"), "reward.functions": ["numeric"]}, "reward.functions=['numeric'] is read by grpo "),
    ({"algo.name": "reward_model", "algo.beta": 0.3}, "dpo, ipo, cdpo alone, not by reward_model"),
    ({"algo.reference_free": True}, "algo.reference_free=True is read by dpo, ipo, cdpo alone, not by grpo"),
    ({"algo.label_smoothing": 0.1}, "algo.label_smoothing=0.1 is read by cdpo alone, not by grpo: leave it out, or "),
    ({"algo.gamma": 0.9}, "algo.gamma=0.9 is read by ppo alone, not by grpo: leave it out, or choose algo=ppo"),
    ({"algo.name": "rloo", "critic.warmup_steps": 1}, "critic.warmup_steps=1 is read by ppo alone, not by rloo"),
    ({"algo.name": "mine", "critic.path": "c"}, "critic.path=c is read by ppo alone, not by mine"),
    ({"algo.name": "sft", "rollout.group_size": 1}, "rollout.group_size=1 is read by grpo and its kin, ppo alone"),
    ({"algo.estimator": "gae"}, "the estimator gae of algo.name=grpo needs a critic's values: choose algo=ppo"),
    ({"algo.name": "ppo", "algo.estimator": "rloo"}, "algo.estimator=rloo doesn't read the values of the critic"),
    ({"algo.name": "ppo", "algo.normalize_by_std": False}, "is not read by the estimator gae"),
    ({"algo.name": "ppo", "critic.warmup_steps": 100}, "critic.warmup_steps=100 must be < driver.num_steps=100"),
    ({"algo.name": "rloo", "algo.normalize_by_std": False}, "algo.normalize_by_std=False is not read by the estimator"),
    ({"algo.name": "reinforce", "algo.old_logprobs": "sampler"}, "is not read without a loss with a ratio: leave it"),
    ({"algo.beta": 0.0, "algo.kl_estimator": "k2"}, "algo.kl_estimator=k2 is not read without algo.beta: leave it out"),
    ({"algo.off_policy_level": "sequence"}, "algo.off_policy_level=sequence is not read without algo.off_policy"),
    ({"algo.kl_target": 6.0}, "algo.kl_target=6.0 adapts the KL in the reward: it needs algo.kl_coef"),
    ({"algo.kl_coef": 0.1, "algo.beta": 0.0, "algo.kl_horizon": 9.0}, "algo.kl_horizon=9.0 adapts the KL in the "),
    ({"algo.name": "rloo", "algo.beta": 0.0, "algo.kl_coef": 0.1, "algo.kl_target": 6.0, "algo.kl_horizon": 6.0,
      "batch.prompts_per_step": 8, "rollout.group_size": 4}, "algo.kl_horizon=6 must be > 6.4 for 32 sequences a step"),
    ({"algo.icepop_high": 3.0, "algo.off_policy": "tis"}, "algo.icepop_high=3.0 is read with algo.off_policy=icepop"),
])
def test_refused(values, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        check(check_values(from_dict(values)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("values", "message"), [
    ({"algo.name": "dr_grpo", "algo.beta": 0.0}, "algo.normalize_by_std=True does nothing: dr_grpo"),
    ({"algo.name": "gspo", "algo.beta": 0.0}, "algo.clip_range=0.2 with gspo: its ratio is a mean over tokens"),
    ({"algo.name": "dapo", "algo.beta": 0.02}, "algo.beta=0.02 with dapo: the paper has no KL"),
    ({"algo.kl_coef": 0.1}, "algo.beta=0.01 and algo.kl_coef=0.1: the KL is paid twice"),
    ({**preset("gspo"), "algo.aggregation": "token_mean"}, "algo.aggregation=token_mean with gspo"),
    ({"algo.clip_range": 0.3}, "the clip of grpo can't bind: there is one update per batch"),
    ({"driver.max_staleness": 2}, "driver.max_staleness=2 with algo.old_logprobs=trainer"),
    ({"driver.max_staleness": 1, "algo.off_policy": "tis", "filter.reward": "task", "filter.oversample": 0.5},
     "filter.oversample=0.5 with driver.max_staleness=1: no spares are drawn"),
])
def test_legal_but_odd(values, message):
    warnings = check(from_dict(values))
    assert len(warnings) == 1 and message in warnings[0]


@pytest.mark.parametrize("values", [
    {"rollout.group_size": 1, "algo.name": "reinforce"},
    {"rollout.top_p": 0.9, "algo.name": "reinforce"},
    {"rollout.top_p": 0.9, "rollout.allow_truncated_sampling": True},
    {**preset("reinforce_pp_baseline"), "algo.beta": 0.0},
    {"algo.clip_range": 0.3, "algo.mini_batches": 2},
    {"driver.max_staleness": 2, "algo.off_policy": "tis", "algo.tis_cap": 3.0},
    preset("sft"), preset("dpo"), preset("ipo"), preset("cdpo"), preset("reward_model"),
    {"algo.name": "ipo", "algo.beta": 0.1, "algo.pair_logprobs": "sum"}, {**preset("dpo"), "algo.reference_free": True},
])
def test_legal(values):
    assert check(from_dict(values)) == []


def test_what_a_user_registered_is_an_algorithm_by_its_name():
    try:
        algo.register_adv_estimator("mine")(lambda *a, **kw: a)
        algo.register_policy_loss("mine_too", ratio=False)(lambda *a, **kw: a)
        first, second = (algo.resolve(AlgoConfig(name=name)) for name in ("mine", "mine_too"))
        assert (first.estimator, first.policy_loss) == ("mine", "ppo") and first.needs_whole_batch
        assert (second.estimator, second.policy_loss) == ("grpo", "mine_too") and not second.ratio_loss
        assert check(from_dict({"algo.name": "mine", "algo.options": {"alpha": 1}, "rollout.group_size": 1})) == []
    finally:
        del ESTIMATORS["mine"], POLICY_LOSSES["mine_too"]


def test_an_estimator_of_a_users_that_needs_values_needs_ppo():
    try:
        algo.register_adv_estimator("valued", needs_values=True)(lambda *a, **kw: a)
        with pytest.raises(UserError, match=r"needs a critic's values: choose algo=ppo algo\.estimator=valued"):
            check(from_dict({"algo.name": "valued"}))
        assert check(from_dict({"algo.name": "ppo", "algo.estimator": "valued"})) == []
        assert algo.resolve(PPOAlgoConfig(estimator="valued")).needs_critic
    finally:
        del ESTIMATORS["valued"]


def test_knobs_that_a_loss_reads_are_options():
    keys = {key for key, _ in options()}
    assert all(f"algo.{knob}" in keys for loss in POLICY_LOSSES.values() for knob in loss.reads)


def groups(values, sizes):
    config, warnings = as_groups(check_values(from_dict(values)), sizes=sizes)
    check_groups(config, sizes=sizes)
    return config, warnings


@pytest.mark.parametrize(("values", "sizes", "message"), [
    ({}, {1, 4}, "a group of 1 has nothing to compare"),
    ({"algo.name": "grpo_vectorized"}, {3, 4}, "the estimator grpo_vectorized works on groups of one size, the data "
                                               "have 3, 4"),
    ({"algo.old_logprobs": "sampler"}, {4}, "algo.old_logprobs=sampler: nobody recorded"),
    ({"algo.off_policy": "tis"}, {4}, "algo.off_policy=tis: nobody recorded"),
    ({"reward.functions": ["numeric"]}, {4}, "reward.functions=['numeric']: there are rewards that are given"),
    ({"driver.max_staleness": 1}, {4}, "driver.max_staleness=1: nothing is rolled out"),
    ({"reward.combine": "each"}, {4}, "reward.combine=each: there is one reward"),
    ({"rollout.num_engines": 2}, {4}, "rollout.num_engines=2: nothing is rolled out"),
    ({"rollout.group_size": 3}, {4}, "rollout.group_size=3: the data have groups of 4: leave it out"),
    ({"driver.streaming": "always"}, {4}, "driver.streaming=always: nothing is rolled out"),
    ({"filter.oversample": 0.5}, {4}, "filter.oversample=0.5: nothing is rolled out"),
    ({"filter.reward": "numeric"}, {4}, "filter.reward=numeric: there is one reward"),
    ({"eval.data": "e.jsonl"}, {4}, "eval.data=e.jsonl: it needs engines"),
])
def test_what_given_groups_lack(values, sizes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        groups(values, sizes)


def test_given_groups_of_any_size():
    config, warnings = groups({}, {2, 5})
    assert (config.rollout.group_size, warnings) == (5, [])
    assert groups({"algo.name": "reinforce"}, {1})[1] == []
    (warning,) = groups(preset("dapo"), {4})[1]
    assert "reward.overlong_penalty=1.0: not added to rewards that are given" in warning
