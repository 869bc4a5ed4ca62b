"""Translates a Config for TRL, or says in one line why TRL can't run it.

Takes:  a Config; the longest prompt, for the size of a micro-batch.
Gives:  `check_trl`: the Config that TRL can run, with warnings; `check_unsloth`; arguments: `opening` for the policy,
        `trainer_arguments` for GRPOConfig or RLOOConfig.
Knows:  which of our options TRL 1.16 has and by what name, and where its defaults would mean another objective.
Never:  imports trl.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flux_ray import algo
from flux_ray.config import (
    Config,
    IPOAlgoConfig,
    PairsConfig,
    PolicyGradientConfig,
    changed,
    options_of,
    preset,
    value_of,
)
from flux_ray.errors import UserError, unknown
from flux_ray.model import resolve_dtype
from flux_ray.model.varlen import TORCH_VARLEN
from flux_ray.names import reward_model_path

#: algorithm ► its arguments of GRPOConfig; rloo has a trainer of its own
ALGORITHMS: dict[str, dict[str, str]] = {
    "grpo": {}, "grpo_vectorized": {}, "dr_grpo": {}, "dapo": {},
    "gspo": {"importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo"},
    "rloo": {},
}
#: objective on pairs ► loss_type of DPOConfig
PAIR_LOSSES = {"dpo": "sigmoid", "ipo": "ipo"}
#: algorithms that run on a model that Unsloth opened
ON_UNSLOTH = ("dpo", "grpo", "grpo_vectorized", "dr_grpo", "dapo")
LOSS_TYPES = {"sequence_mean": "grpo", "sequence": "grpo", "token_mean": "dapo", "constant_length": "dr_grpo"}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}

#: option ► the only value that TRL can run, and why
ONLY: dict[str, tuple[object, str]] = {
    "algo.estimator": (None, "it has its algorithms' own"),
    "algo.policy_loss": (None, "it has its algorithms' own"),
    "algo.old_logprobs": ("trainer", "its ratio is over the trainer's old policy"),
    "algo.off_policy": ("none", "it corrects for the sampler under vLLM alone, and has no IcePop"),
    "algo.kl_target": (None, "it adapts no KL"),
    "reward.combine": ("sum", "where it normalises each reward alone it whitens their sum over the batch as well"),
    "reward.on_failure": ("stop", "it drops no groups"),
    "rollout.function": ("single_turn", "our rollouts need our engines"),
    "rollout.split_groups": (1, "it generates in its own process"),
    "filter.oversample": (0.0, "it has no dynamic sampling"),
    "rollout.stop": ([], "it stops at the end token alone"),
    "rollout.ignore_eos": (False, "it stops at the end token"),
    "driver.max_staleness": (0, "it is synchronous"),
    "driver.streaming": ("auto", "it trains on whole batches"),
    "eval.data": (None, "evaluate the model it gives: FluxTrainer.evaluate"),
    "checkpoint.every": (0, "it writes the model at the end"),
    "checkpoint.best": (None, "it writes the model at the end"),
    "resume": (None, "it starts anew"),
    "model.layout": ("auto", "it pads"),
    "train.deepspeed": ({}, "it runs in one process"),
    "train.num_ranks": (1, "it runs in one process"),
    "train.zero_stage": (0, "it runs in one process"),
    "rollout.num_engines": (1, "it generates in its own process"),
    "rollout.tensor_parallel_size": (1, "it generates in its own process"),
    "rollout.engine_args": ({}, "it generates with transformers"),
    "train.lora.rank": (0, "adapters are trained on Ray alone"),
}


def check_trl(config: Config) -> tuple[Config, list[str]]:
    """The config as TRL runs it, and warnings of what TRL does otherwise. UserError for a setting that it hasn't."""
    for problem in _problems(config):
        raise UserError(f"backend=trl: {problem}")
    if not isinstance(config, PolicyGradientConfig):
        return config, []
    warnings = []
    if config.filter.reward is not None:
        warnings.append(f"backend=trl has no dynamic sampling: {config.algo.name} keeps groups without an advantage")
    if config.algo.entropy_coef and algo.resolve(config.algo).aggregation != "token_mean":
        warnings.append("backend=trl takes the entropy bonus as a mean over tokens, whatever weighs the other terms")
    return changed(config, {"filter.reward": None}), warnings


def check_unsloth(config: Config) -> None:
    """UserError for an algorithm that Unsloth hasn't. `check_trl` refuses the rest."""
    if config.algo.name not in ON_UNSLOTH:
        raise UserError(f"backend=unsloth has no {config.algo.name} (it has {', '.join(ON_UNSLOTH)})")


def _problems(config: Config) -> Iterator[str]:
    name = config.algo.name
    if name not in {**ALGORITHMS, **PAIR_LOSSES}:
        yield str(unknown("algorithm", name, {**ALGORITHMS, **PAIR_LOSSES}))
    own = dict(options_of(type(config)))
    for key, (value, why) in ONLY.items():
        if key in own and value_of(config, key) != value:
            yield f"{key}={value_of(config, key)} isn't there: {why}"
    if config.model.attention == TORCH_VARLEN:
        yield f"model.attention={TORCH_VARLEN} isn't there: it pads"
    if isinstance(config, PairsConfig):
        yield from _pair_problems(config)
    if isinstance(config, PolicyGradientConfig):
        yield from _policy_problems(config)


def _policy_problems(config: PolicyGradientConfig) -> Iterator[str]:
    name = config.algo.name
    if config.reference.path is not None and (config.algo.beta or config.algo.kl_coef):
        yield f"reference.path={config.reference.path} isn't there: its reference is the policy as it starts"
    for reference in config.reward.functions:
        if reward_model_path(reference) is not None:
            yield f"reward.functions has {reference}: our reward models are served on Ray alone"
    chosen = preset(name).get("filter", {}).get("reward")
    if config.filter.reward not in (None, chosen):
        yield f"filter.reward={config.filter.reward} isn't there: it has no dynamic sampling"
    algorithm = algo.resolve(config.algo)
    if name in ("gspo", "rloo") and algorithm.aggregation != "sequence":
        yield f"algo.aggregation={algorithm.aggregation} isn't there for {name}"
    if name == "cispo" and algorithm.aggregation != "token_mean":
        yield f"algo.aggregation={algorithm.aggregation} isn't there for cispo"
    if config.algo.beta and (config.algo.kl_estimator != "k3" or name == "rloo"):
        yield f"algo.beta={config.algo.beta} with algo.kl_estimator={config.algo.kl_estimator}: it has k3, not for rloo"
    if config.algo.kl_coef and name != "rloo":
        yield f"algo.kl_coef={config.algo.kl_coef} isn't there for {name}: its KL is in the loss (algo.beta)"
    for key in ("entropy_coef", "dual_clip"):
        if name == "rloo" and getattr(config.algo, key):
            yield f"algo.{key}={getattr(config.algo, key)} isn't there for rloo"


def _pair_problems(config: PairsConfig) -> Iterator[str]:
    if config.algo.reference_free:
        yield "algo.reference_free=True isn't there: it has a reference always"
    if isinstance(config.algo, IPOAlgoConfig) and config.algo.pair_logprobs != "mean":
        yield f"algo.pair_logprobs={config.algo.pair_logprobs} isn't there: its ipo takes means over tokens"


def micro_batch_size(config: PolicyGradientConfig, *, longest_prompt: int) -> int:
    """Samples of one forward pass: the most that divide an update's and keep to the token budget, at least 1."""
    update = config.batch.prompts_per_step * config.rollout.group_size // config.algo.mini_batches
    tokens = longest_prompt + config.rollout.max_tokens
    most = min(config.batch.micro_batch_size or update, max(config.batch.max_tokens_per_micro_batch // tokens, 1))
    return max(size for size in range(1, most + 1) if update % size == 0)


def trainer_arguments(config: PolicyGradientConfig, *, longest_prompt: int, device: str) -> dict[str, Any]:
    """Keyword arguments of GRPOConfig (rloo: RLOOConfig) for a config that `check_trl` gave."""
    algorithm, rollout = config.algo, config.rollout
    size = micro_batch_size(config, longest_prompt=longest_prompt)
    update = config.batch.prompts_per_step * rollout.group_size // algorithm.mini_batches
    high = algorithm.clip_range if algorithm.clip_range_high is None else algorithm.clip_range_high
    common: dict[str, Any] = {
        **optimizer_arguments(config, device=device),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": update // size,
        "steps_per_generation": update // size * algorithm.mini_batches,
        "num_iterations": algorithm.epochs,
        "max_steps": config.driver.num_steps * algorithm.epochs * algorithm.mini_batches,
        "num_generations": rollout.group_size,
        "max_completion_length": rollout.max_tokens,
        "temperature": rollout.temperature, "top_p": rollout.top_p, "top_k": rollout.top_k,
        "min_p": rollout.min_p or None,
        "epsilon": algorithm.clip_range, "epsilon_high": high,
        "mask_truncated_completions": algo.masks_truncated(config),
        "shuffle_dataset": False,
        "logging_steps": algorithm.epochs * algorithm.mini_batches,
    }
    if algorithm.name == "rloo":
        return {**common, "beta": algorithm.kl_coef, "normalize_advantages": False}
    resolved = algo.resolve(algorithm)
    return {
        **common,
        "beta": algorithm.beta,
        "use_bias_correction_kl": False,   # TRL's default multiplies the KL by the ratio
        "delta": algorithm.dual_clip,
        "entropy_coef": algorithm.entropy_coef,
        "scale_rewards": "group" if algorithm.normalize_by_std and resolved.estimator != "dr_grpo" else "none",
        "loss_type": LOSS_TYPES[resolved.aggregation],
        **ALGORITHMS[algorithm.name],
        **({"epsilon_high": 1 + high} if algorithm.name == "cispo" else {}),   # there TRL's option is the bound itself
    }


def opening(config: Config) -> dict[str, str]:
    """Keyword arguments for TRL to open the policy: weights in fp32, whatever type it computes in.

    In bf16 an update at a usual learning rate is less than the last bit of most weights: they would never move.
    """
    attention = "sdpa" if config.model.attention == "auto" else config.model.attention
    return {"dtype": "float32", "attn_implementation": attention}


def optimizer_arguments(config: Config, *, device: str) -> dict[str, Any]:
    """Keyword arguments that all of TRL's trainers take."""
    train = config.train
    return {
        "learning_rate": train.learning_rate, "warmup_steps": train.warmup_steps,
        "lr_scheduler_type": SCHEDULES[train.schedule],
        "adam_beta1": train.adam_betas[0], "adam_beta2": train.adam_betas[1], "adam_epsilon": train.adam_eps,
        "weight_decay": train.weight_decay, "max_grad_norm": train.max_grad_norm,
        "gradient_checkpointing": train.gradient_checkpointing, "disable_dropout": True,
        "seed": config.seed, "bf16": resolve_dtype(config.model.dtype, device) == torch.bfloat16,
        "use_cpu": device == "cpu", "save_strategy": "no", "report_to": "none",
    }
