"""The one Config: names, types, bounds, and what values must be beside one another."""

from __future__ import annotations

import pytest

from flux_ray import config as configs
from flux_ray.config import PolicyGradientConfig, from_dict, options, preset, to_dict, validate
from flux_ray.errors import UserError
from flux_ray.names import RENAMED, canonical, flatten

pytestmark = pytest.mark.unit

KEYS = [key for key, _ in options()]
READY = {"model.path": "m", "data.train": "d.jsonl"}


def refusal(values: dict) -> str:
    with pytest.raises(UserError) as caught:
        validate(from_dict({**READY, **values}))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_given_is_the_defaults():
    assert from_dict({}) == PolicyGradientConfig()


def test_to_dict_comes_back():
    config = from_dict({"rollout.engine_args": {"enforce_eager": True}, "reward.functions": ["numeric"], "seed": 3})
    assert from_dict(to_dict(config)) == config
    assert config.rollout.engine_args == {"enforce_eager": True}


def test_nested_dotted_and_short_names_mix():
    config = from_dict({"train": {"num_ranks": 2}, "rollout.max_tokens": 5, "num_steps": 7, "algorithm": {"n": 8}})
    assert (config.train.num_ranks, config.rollout.max_tokens, config.driver.num_steps) == (2, 5, 7)
    assert config.rollout.group_size == 8


@pytest.mark.parametrize("values", [
    {"train": {"lora": {"rank": 8, "targets": ["q_proj"]}}}, {"lora": {"rank": 8, "targets": ["q_proj"]}},
    {"train": {"lora.rank": 8}, "target_modules": ["q_proj"]}, {"train.lora.rank": 8, "train.lora.targets": ["q_proj"]},
])
def test_a_room_in_a_room(values):
    config = from_dict(values)
    assert (config.train.lora.rank, config.train.lora.targets) == (8, ["q_proj"])
    assert from_dict(to_dict(config)) == config


@pytest.mark.parametrize("alias, key", [
    ("epsilon", "algo.clip_range"), ("clip_ratio", "algo.clip_range"), ("cliprange", "algo.clip_range"),
    ("algo.eps_clip", "algo.clip_range"), ("epsilon_high", "algo.clip_range_high"),
    ("num_generations", "rollout.group_size"), ("n", "rollout.group_size"), ("rollout.n", "rollout.group_size"),
    ("num_samples", "rollout.group_size"), ("eval.num_samples", "eval.num_samples"), ("kl_loss_coef", "algo.beta"),
    ("beta", "algo.beta"), ("kl_coef", "algo.kl_coef"), ("algorithm_config.group_size", "rollout.group_size"),
    ("rollout.engine_args.anything", "rollout.engine_args.anything"), ("lr", "train.learning_rate"),
    ("lora_r", "train.lora.rank"), ("lora.rank", "train.lora.rank"), ("target_modules", "train.lora.targets"),
])
def test_names_people_bring(alias, key):
    assert canonical(alias, options=KEYS) == key


@pytest.mark.parametrize("spelling", ["drgrpo", "dr-grpo", "dr_grpo"])
def test_spellings_of_an_algorithm(spelling):
    assert from_dict({"algorithm": spelling}).algo.name == "dr_grpo"


@pytest.mark.parametrize("name", ["GRPO", "PPO", "DPO", "SFT"])
def test_an_algorithm_in_capitals(name):
    assert from_dict({"algorithm": name}).algo.name == name.lower()


def test_two_names_that_disagree():
    assert refusal({"epsilon": 0.1, "clip_ratio": 0.2}) == (
        "algo.clip_range: epsilon says 0.1 and clip_ratio says 0.2; give one of them")
    assert from_dict({"epsilon": 0.1, "clip_ratio": 0.1}).algo.clip_range == 0.1


def test_cispo_s_epsilon_high_means_two_things():
    assert "algo.clip_range_high" in refusal({"algorithm": "cispo", "epsilon_high": 5.0})


@pytest.mark.parametrize("key, nearest", [
    ("rollout.grop_size", "rollout.group_size"), ("grop_size", "rollout.group_size"),
    ("rolout.deadline_s", "rollout.deadline_s"), ("train.learning_rat", "train.learning_rate"),
    ("algo.clip_rang", "algo.clip_range"), ("num_generatons", "rollout.group_size"),
    ("train.lora.rnk", "train.lora.rank"), ("lora.target", "train.lora.targets"),
])
def test_unknown_option_names_the_nearest(key, nearest):
    assert refusal({key: 1}) == f"unknown option {key!r}: did you mean {nearest!r}?"


@pytest.mark.parametrize("key", ["rollout.samples_per_prompt", "samples_per_prompt"])
def test_an_old_name_is_answered_with_the_new_one(monkeypatch, key):
    monkeypatch.setitem(RENAMED, "rollout.samples_per_prompt", "rollout.group_size")
    assert refusal({key: 1}) == f"option {key!r} has a new name: 'rollout.group_size'"


def test_unknown_option_like_nothing():
    assert refusal({"qqqq": 1}) == "unknown option 'qqqq' (flux-ray train --help lists them all)"


@pytest.mark.parametrize("key", ["reward_model_name", "algo.reward_model", "reward.reward_model_path"])
def test_a_reward_model_by_other_names(key):
    assert refusal({key: "a/b"}).endswith("a reward model is one of reward.functions, as model:PATH")


def test_a_name_of_several_options():
    assert "write it in full" in refusal({"deadline_s": 1.0})


@pytest.mark.parametrize("key, value", [
    ("rollout.group_size", "many"), ("rollout.group_size", 1.5), ("train.learning_rate", "fast"), ("seed", None),
    ("reward.functions", 3), ("data.shuffle", "perhaps"),
])
def test_wrong_type_names_key_and_value(key, value):
    message = refusal({key: value})
    assert message.startswith(f"{key}: ") and (value is None or str(value) in message)


@pytest.mark.parametrize("values, message", [
    ({"rollout.group_size": 0}, "rollout.group_size must be >= 1, got 0"),
    ({"train.zero_stage": 4}, "train.zero_stage must be <= 3, got 4"),
    ({"train.learning_rate": 1e39}, "train.learning_rate must be <= 10, got 1e+39"),
    ({"rollout.temperature": 0.0}, "rollout.temperature must be > 0, got 0.0"),
    ({"train.learning_rate": float("nan")}, "train.learning_rate must be a finite number, got nan"),
    ({"algo.kl_estimator": "k4"}, "algo.kl_estimator must be one of k1, k2, k3; got 'k4'"),
    ({"model.path": None}, "model.path is missing"),
    ({"data.train": None}, "data.train is missing"),
    ({"batch.prompts_per_step": 10, "algo.mini_batches": 4},
     "batch.prompts_per_step=10 must be divisible by algo.mini_batches=4"),
    ({"batch.prompts_per_step": 6, "train.num_ranks": 4}, "= 6 must be divisible by train.num_ranks=4"),
    ({"reward.functions": ["numeric"], "reward.weights": [1.0, 2.0]}, "reward.weights=[1.0, 2.0] must be as many as"),
    ({"train.adam_betas": [0.9]}, "train.adam_betas must be two numbers"),
    ({"observability.trace_steps": [3, -1]}, "observability.trace_steps=[-1] counts from the end"),
    ({"algo.icepop_low": 9.0}, "algo.icepop_low=9.0 must be < algo.icepop_high=5.0"),
    ({"rollout.max_model_len": 99, "rollout.max_tokens": 99}, "rollout.max_model_len=99 must be >"),
    ({"eval.every": 5}, "eval.every=5 needs eval.data"),
    ({"train.lora.rank": -1}, "train.lora.rank must be >= 0, got -1"),
    ({"train.lora.alpha": 8.0}, "train.lora.alpha=8.0 is read with train.lora.rank > 0 alone"),
    ({"train.lora": {"rank": 4, "targets": []}}, "train.lora.targets must be all-linear or endings"),
    ({"train.lora": 8}, "train.lora: holds several options, so it takes a mapping, not 8"),
    ({"train.lora.rank": 4, "reference.num_actors": 2}, "reference.num_actors=2 beside train.lora.rank=4"),
    ({"eval.stop_at": 0.8}, "eval.stop_at=0.8 needs eval.every"),
])
def test_validate_names_key_and_value(values, message):
    assert message in refusal(values)


def test_what_is_right_passes():
    config = from_dict({**READY, "batch.prompts_per_step": 8, "algo.mini_batches": 2, "train.num_ranks": 4})
    assert validate(config) is config


def test_every_option_has_a_meaning():
    for key, f in options():
        assert f.metadata["help"], key
        assert not f.metadata["choices"] or configs.default_of(f) in (None, *f.metadata["choices"])


def test_a_users_own_algorithm_has_no_preset():
    assert preset("mine") == {} and preset("drgrpo")["algo"]["name"] == "dr_grpo"


def test_flatten_keeps_open_mappings_whole():
    assert flatten({"reward": {"options": {"regex": {"pattern": "x"}}}}, options=KEYS) == {
        "reward.options": {"regex": {"pattern": "x"}}}


@pytest.mark.parametrize("name", configs.READERS)
def test_each_objective_comes_back_from_its_values(name):
    config = configs.READERS[name]()
    assert type(from_dict(to_dict(config))) is type(config) and from_dict(to_dict(config)) == config


def test_defaults_are_the_objective_s_own():
    assert (from_dict({"algo.name": "dpo"}).algo.beta, from_dict({}).algo.beta) == (0.1, 0.01)
    assert from_dict({"algo.name": "ppo"}).algo.kl_coef == 0.05 and from_dict({"algo.name": "mine"}).algo.kl_coef == 0.0
    assert from_dict({"algo.name": "sft"}).train.learning_rate == 2e-5


@pytest.mark.parametrize(("values", "message"), [
    ({"algo.name": "sft", "rollout.engine_args.a": 1}, "rollout.engine_args.a=1 is read by grpo and its kin, ppo "
     "alone, not by sft, which learns from examples and rolls nothing out: leave it out"),
    ({"algo.name": "dpo", "data.completion_column": "c"}, "data.completion_column=c is read by sft alone, not by dpo: "
     "leave it out, or choose algo=sft"),
    ({"algo.name": "reward_model", "reference.path": "r"}, "reference.path=r is read by grpo and its kin, ppo, dpo, "
     "ipo, cdpo alone, not by reward_model: leave it out"),
])
def test_an_option_of_another_objective_is_refused_by_who_reads_it(values, message):
    assert refusal(values) == message


def test_of_an_earlier_run_what_the_objective_does_not_have_was_never_read():
    """An older version saved every option there was."""
    before = {"algo": {"name": "dpo", "beta": 0.3, "gamma": 1.0, "entropy_coef": 0.0}, "rollout": {"group_size": 4},
              "critic": {"path": None}, "train": {"num_ranks": 2}}
    config = from_dict({"driver.num_steps": 7}, before=before)
    assert config == from_dict({"algo": {"name": "dpo", "beta": 0.3}, "train.num_ranks": 2, "driver.num_steps": 7})
    with pytest.raises(UserError, match=r"rollout\.group_size=4 is read by"):
        from_dict({"rollout.group_size": 4}, before=before)
    with pytest.raises(UserError, match=r"unknown option 'rollout\.grop_size'"):
        from_dict({}, before={"rollout": {"grop_size": 4}})


def test_what_hydra_was_given_is_known_from_what_was_left_alone():
    tree = configs.schema()
    assert configs.given(tree) == {}
    tree.rollout.engine_args.a, tree.batch.prompts_per_step, tree.model.path = 1, "${rollout.group_size}", None
    given = configs.given(tree)
    assert given == {"rollout.engine_args": {"a": 1}, "batch.prompts_per_step": "${rollout.group_size}",
                     "model.path": None}
    assert from_dict(given).batch.prompts_per_step == 4


def test_an_option_has_one_type_whoever_reads_it():
    """As Hydra's schema holds one of them."""
    for key, f in options():
        assert {other.type for other in configs.readers(key).values()} == {f.type}, key


def test_changed_keeps_the_objective():
    config = from_dict({"algo.name": "ppo"})
    other = configs.changed(config, {"critic.warmup_steps": 3, "seed": 5})
    assert (type(other), other.critic.warmup_steps, other.seed, config.seed) == (type(config), 3, 5, 0)
