"""Our options in TRL's words; what it hasn't is refused by name."""

from __future__ import annotations

import importlib.util

import pytest

from flux_ray import FluxConfig
from flux_ray.backends import unsloth
from flux_ray.backends.trl import require
from flux_ray.backends.trl_settings import ALGORITHMS, check_trl, micro_batch_size, opening, trainer_arguments
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

READY = {"model_path": "m", "data.train": "d.jsonl"}


def arguments(algorithm: str, **options):
    config, _ = check_trl(FluxConfig(algorithm=algorithm, **READY, **options))
    return trainer_arguments(config, longest_prompt=16, device="cpu")


@pytest.mark.parametrize(("algorithm", "expected"), [
    ("grpo", {"loss_type": "grpo", "scale_rewards": "group", "beta": 0.01, "epsilon": 0.2, "epsilon_high": 0.2,
              "use_bias_correction_kl": False, "entropy_coef": 0.01}),
    ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0}),
    ("dapo", {"loss_type": "dapo", "epsilon_high": 0.28, "mask_truncated_completions": False}),
    ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}),
    ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),   # there the bound itself
    ("rloo", {"beta": 0.05, "normalize_advantages": False}),
])
def test_each_algorithm(algorithm, expected):
    assert expected.items() <= arguments(algorithm).items()


def test_every_algorithm_that_it_has_has_arguments():
    for name in ALGORITHMS:
        assert arguments(name)["num_generations"] == 4


def test_batches_and_updates():
    """8 prompts x 4 samples in 2 updates of 16, each in forward passes of at most 6: 4; all of it twice."""
    given = arguments("grpo", prompts_per_step=8, mini_batches=2, epochs=2, micro_batch_size=6, num_steps=5)
    assert given["per_device_train_batch_size"] == 4 and given["gradient_accumulation_steps"] == 4
    assert given["steps_per_generation"] == 8 and given["num_iterations"] == 2
    assert given["max_steps"] == 5 * 2 * 2 and given["logging_steps"] == 4


@pytest.mark.parametrize(("budget", "size"), [(8192, 16), (300, 1), (6 * 272, 4)])
def test_a_micro_batch_keeps_to_the_token_budget(budget, size):
    config = FluxConfig(prompts_per_step=4, **{"batch.max_tokens_per_micro_batch": budget})
    assert micro_batch_size(config, longest_prompt=16) == size


@pytest.mark.parametrize(("algorithm", "options", "message"), [
    ("gspo_token", {}, "backend=trl: unknown algorithm 'gspo_token': did you mean 'gspo'"),
    ("reinforce_pp", {}, "backend=trl: unknown algorithm 'reinforce_pp'"),
    ("grpo", {"off_policy": "icepop"}, "algo.off_policy=icepop isn't there"),
    ("grpo", {"old_logprobs": "sampler"}, "algo.old_logprobs=sampler isn't there"),
    ("grpo", {"kl_estimator": "k2"}, "kl_estimator=k2"),
    ("grpo", {"algo.kl_coef": 0.1}, "algo.kl_coef=0.1 isn't there for grpo"),
    ("grpo", {"filter.reward": "task"}, "filter.reward=task isn't there: it has no dynamic sampling"),
    ("grpo", {"estimator": "rloo"}, "algo.estimator=rloo isn't there"),
    ("grpo", {"max_staleness": 1}, "driver.max_staleness=1 isn't there: it is synchronous"),
    ("grpo", {"num_ranks": 2}, "train.num_ranks=2 isn't there: it runs in one process"),
    ("grpo", {"zero_stage": 3}, "train.zero_stage=3 isn't there"),
    ("grpo", {"num_engines": 2}, "rollout.num_engines=2 isn't there"),
    ("grpo", {"rollout.engine_args": {"enforce_eager": True}}, "rollout.engine_args="),
    ("grpo", {"reference.path": "other"}, "reference.path=other isn't there"),
    ("grpo", {"attention": "torch_varlen"}, "model.attention=torch_varlen isn't there: it pads"),
    ("gspo", {"aggregation": "token_mean"}, "algo.aggregation=token_mean isn't there for gspo"),
    ("rloo", {"entropy_coef": 0.1}, "algo.entropy_coef=0.1 isn't there for rloo"),
    ("grpo", {"train.lora.rank": 8}, "train.lora.rank=8 isn't there: adapters are trained on Ray alone"),
])
def test_what_it_has_not_is_refused_by_name(algorithm, options, message):
    with pytest.raises(UserError, match="backend=trl") as caught:
        check_trl(FluxConfig(algorithm=algorithm, **READY, **options))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("dtype", "device", "mixed"), [
    ("auto", "cpu", False), ("auto", "cuda", True), ("bfloat16", "cpu", True), ("float32", "cuda", False),
])
def test_weights_are_fp32_whatever_it_computes_in(dtype, device, mixed):
    """Of weights in bf16 most would never move: an update is less than their last bit."""
    config = FluxConfig(**READY, **{"model.dtype": dtype})
    assert opening(config)["dtype"] == "float32"
    assert trainer_arguments(config, longest_prompt=16, device=device)["bf16"] is mixed


def test_what_differs_by_its_nature_is_said():
    config, said = check_trl(FluxConfig(algorithm="dapo", **READY))
    assert config.filter.reward is None and "no dynamic sampling" in said[0]
    _, said = check_trl(FluxConfig(algorithm="grpo", **READY))
    assert len(said) == 1 and "entropy" in said[0]


def test_a_reference_that_is_not_asked_is_not_refused():
    check_trl(FluxConfig(algorithm="dapo", **READY, **{"reference.path": "other"}))
    check_trl(FluxConfig(algorithm="dpo", **READY, **{"reference.path": "other"}))


def test_a_package_that_is_not_there():
    with pytest.raises(UserError, match="backend=trl needs the no_such_package package: do this"):
        require("no_such_package", backend="trl", install="do this")


def test_unsloth_says_what_is_missing():
    with pytest.raises(UserError, match="backend=unsloth has no gspo"):
        unsloth.train(FluxConfig(algorithm="gspo", **READY))
    import torch

    if not torch.cuda.is_available() or importlib.util.find_spec("unsloth") is None:
        with pytest.raises(UserError, match="backend=unsloth needs"):
            unsloth.train(FluxConfig(algorithm="grpo", **READY))
