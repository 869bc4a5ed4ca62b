"""Options by the names that other libraries have: each is mapped, or answered with what there is instead."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest

from flux_ray import FluxConfig, UserError
from flux_ray.__main__ import _by_our_name
from flux_ray.config import open_options, options
from flux_ray.names import others

pytestmark = pytest.mark.unit

KEYS = [key for key, _ in options()]


def exists(option: str) -> bool:
    return option in KEYS or any(option.startswith(f"{key}.") for key in open_options())


@pytest.mark.parametrize("library", others.TABLES)
def test_what_a_table_names_exists(library):
    named = {name: others.option_of(ours) for name, ours in others.TABLES[library].items()}
    assert {name: option for name, option in named.items() if option is not None and not exists(option)} == {}


def test_no_name_means_two_options():
    meant: dict[str, set[str]] = {}
    for name, ours in itertools.chain(*(table.items() for table in others.TABLES.values())):
        if others.option_of(ours) is not None:
            meant.setdefault(name, set()).add(str(others.option_of(ours)))
    assert {name: several for name, several in meant.items() if len(several) > 1} == {}


def test_every_option_of_trl_is_answered():
    trl = pytest.importorskip("trl")
    classes = (trl.GRPOConfig, trl.RLOOConfig, trl.DPOConfig, trl.SFTConfig, trl.RewardConfig)
    theirs = {f.name for cls in classes for f in dataclasses.fields(cls)}
    assert len(theirs) > 200
    assert [name for name in sorted(theirs) if name not in KEYS and others.counterpart(name) is None] == []


@pytest.mark.parametrize("library", ["openrlhf", "verl"])
def test_every_option_of_a_list_is_answered(library):
    theirs = Path(__file__).with_name(f"{library}.txt").read_text().split()
    assert len(theirs) > 300
    unknown = [name for name in theirs if others.counterpart(name) is None and others.section_counterpart(name) is None]
    assert unknown == []


@pytest.mark.parametrize(("given", "key", "value"), [
    ({"checkpoint_interval": 5}, "checkpoint.every", 5),
    ({"eval_interval": 7, "eval.data": "x"}, "eval.every", 7),
    ({"output_dir": "here"}, "run_dir", "here"),
    ({"adam_epsilon": 1e-6}, "train.adam_eps", 1e-6),
    ({"max_completion_length": 9}, "rollout.max_tokens", 9),
    ({"actor_rollout_ref.actor.loss_agg_mode": "token-mean"}, "algo.aggregation", "token_mean"),
    ({"actor_rollout_ref": {"rollout": {"n": 6}}}, "rollout.group_size", 6),
    ({"trainer.save_freq": -1}, "checkpoint.every", 0),
    ({"algorithm.adv_estimator": "rloo"}, "algo.name", "rloo"),
    ({"vllm.num_engines": 3}, "rollout.num_engines", 3),
    ({"rollout_batch_size": 12}, "batch.prompts_per_step", 12),
    ({"temperature": 0.7}, "rollout.temperature", 0.7),
    ({"use_cpu": True}, "cluster.device", "cpu"),
    ({"reward_function": ["numeric"]}, "reward.functions", ["numeric"]),
])
def test_mapped_in_python(given, key, value):
    config = FluxConfig(**given)
    for part in key.split("."):
        config = getattr(config, part)
    assert config == value


@pytest.mark.parametrize(("given", "said"), [
    ({"num_epochs": 3}, "no option 'num_epochs' here: the length is in steps: driver.num_steps"),
    ({"use_peft": True}, "train.lora.rank=16"),
    ({"loss_type": "dapo"}, "algo.aggregation says how tokens weigh"),
    ({"batch_size": 8}, "batch.prompts_per_step prompts make a step"),
    ({"wandb_project": "x"}, "observability.monitors=[wandb] writes to W&B"),
    ({"trainer.nnodes": 2}, "actors are placed by their number"),
    ({"actor_rollout_ref.actor.fsdp_config.param_offload": True}, "training is sharded by DeepSpeed"),
    ({"transfer_queue.enable": True}, "groups stay with the rollout worker"),
    ({"colour": 3}, "unknown option 'colour' (flux-ray train --help lists them all)"),
])
def test_answered_in_python(given, said):
    with pytest.raises(UserError) as caught:
        FluxConfig(**given)
    assert said in str(caught.value)


@pytest.mark.parametrize(("written", "ours"), [
    ("max_completion_length=9", "rollout.max_tokens=9"),
    ("actor_rollout_ref.actor.loss_agg_mode=token-mean", "algo.aggregation=token_mean"),
    ("+actor_rollout_ref.rollout.n=4", "+rollout.group_size=4"),
    ("use_cpu=True", "cluster.device=cpu"),
    ("dynamic_filtering=false", "filter.reward=null"),
    ("num_epochs=3", "num_epochs=3"),   # Hydra refuses it, and then it is answered
])
def test_on_the_command_line(written, ours):
    assert _by_our_name(written) == ours
