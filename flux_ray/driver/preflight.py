"""Everything that can be refused before an actor starts.

Takes:  a Config.
Gives:  Prepared: the config with what it left open filled in, the encoded prompts, the warnings.
Knows:  which room checks what; the order: values, then files, then the model's own limits.
Never:  starts a process.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_ray import algo
from flux_ray.algo.check import check as check_algo
from flux_ray.algo.filters import check_filter
from flux_ray.algo.trial import try_registered
from flux_ray.config import Config, validate
from flux_ray.data import PromptSource, are_groups
from flux_ray.data.preferences import CHOSEN, REJECTED
from flux_ray.data.prompts import TRAIN
from flux_ray.data.rows import load_rows
from flux_ray.driver import offline_data
from flux_ray.driver import state as saved
from flux_ray.driver.offline_data import OfflineData
from flux_ray.driver.state import LoopState
from flux_ray.errors import UserError
from flux_ray.model import check_targets, context_length, load_tokenizer, skeleton
from flux_ray.names import REWARD_MODEL, reward_model_path
from flux_ray.plugins import load_plugins
from flux_ray.reward import RewardFunction, count_silent, find_answer_column, resolve_functions
from flux_ray.reward.model import check_reward_models, have_same_tokens
from flux_ray.rollout.check import check_engine_args
from flux_ray.rollout.functions import get_rollout
from flux_ray.train import check_deepspeed_options

WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")  # files that a model folder's weights may be in


@dataclass(frozen=True)
class Prepared:
    config: Config
    prompts: PromptSource | None  # reinforcement learning
    offline: OfflineData | None  # training without rollouts
    eval_prompts: PromptSource | None
    needs_reference: bool  # reference actors
    start: LoopState
    checkpoint: Path | None  # to load before the first step
    warnings: tuple[str, ...]


def prepare(config: Config) -> Prepared:
    """Check it all. UserError for the first mistake: one line with key, file and row."""
    # A hub that can't be reached is told in one line; its client would tell of each of its tries beforehand.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    config = _absolute(config)
    load_plugins(config.plugins)
    config = validate(config)
    warnings = list(check_algo(config))
    try_registered(config)
    check_engine_args(config.rollout)
    check_deepspeed_options(config)
    get_rollout(config.rollout.function)
    assert config.model.path is not None  # validate has seen to it
    limit = config.rollout.max_model_len or context_length(config.model.path)
    _check_weights("model.path", config.model.path)
    _check_targets(config)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    checkpoint = saved.find(config.resume) if config.resume else None
    start = saved.load(checkpoint) if checkpoint else LoopState(step=0, next_uid=0)
    if start.step > config.driver.num_steps:
        raise UserError(
            f"driver.num_steps={config.driver.num_steps} is less than the {start.step} steps done in {checkpoint}"
        )
    needs_reference = algo.needs_reference(config.algo) and not algo.reference_is_base(config)
    if needs_reference and config.reference.path:
        _check_reference(config.reference.path, length_given=config.rollout.max_model_len is not None)
    if algo.kind_of(config.algo) is not algo.REINFORCEMENT:
        offline = offline_data.read(config, tokenizer, context_length=limit)
        warnings += offline.warnings
        return Prepared(config, None, offline, None, needs_reference, start, checkpoint, tuple(warnings))
    rows = load_rows(str(config.data.train), split=config.data.split, max_rows=config.data.max_rows,
                     column=config.data.prompt_column, on_bad_row=config.data.on_bad_row)
    if are_groups(rows):
        if algo.needs_critic(config.algo):
            raise UserError(f"data.train={config.data.train} holds groups with rewards: {config.algo.name} learns from "
                            "what it samples itself, scored by reward.functions")
        config, offline = offline_data.read_groups(rows, config, tokenizer, context_length=limit)
        warnings += offline.warnings
        return Prepared(config, None, offline, None, needs_reference, start, checkpoint, tuple(warnings))
    prompts = PromptSource(rows, config, tokenizer, context_length=limit, role=TRAIN)
    warnings += [*_skipped(prompts.num_skipped, prompts.source), *_pairs(config, prompts)]
    config = _with(config, "reward", functions=list(config.reward.functions) or [_default_reward(config, prompts)])
    warnings += _reward_models(config, tokenizer, prompts)
    if algo.needs_critic(config.algo) and config.critic.path:
        _check_critic(config.critic.path, tokenizer, longest=prompts.longest_prompt + config.rollout.max_tokens)
    functions, silent = _rewards(config, prompts)
    warnings += silent
    check_filter(config, [function.name for function in functions])
    eval_prompts = None
    if config.eval.data:
        eval_prompts = PromptSource.for_eval(config, tokenizer, context_length=limit)
        warnings += _rewards(config, eval_prompts)[1]
    return Prepared(config, prompts, None, eval_prompts, needs_reference, start, checkpoint, tuple(warnings))


def _pairs(config: Config, prompts: PromptSource) -> list[str]:
    """A warning that of preference pairs the prompts alone are read; UserError where no reward is named either."""
    if not {CHOSEN, REJECTED} <= prompts.columns:
        return []
    learners = ", ".join(name for name, kind in algo.KINDS.items() if kind.data == algo.PAIRS)
    what = (f"{prompts.source} holds preference pairs ({CHOSEN}, {REJECTED}), of which algo.name={config.algo.name} "
            f"reads the prompts alone ({learners} learn from pairs)")
    if not config.reward.functions and find_answer_column(config, prompts.columns) is None:
        raise UserError(f"no reward: {what}, and reward.functions names nothing that scores what it samples")
    return [what]


def _reward_models(config: Config, tokenizer: Any, prompts: PromptSource) -> list[str]:
    for reference in config.reward.functions:
        path = reward_model_path(reference)
        if path == "":
            raise UserError(f"reward.functions: {reference!r} names no reward model: {REWARD_MODEL}PATH does")
        if path is not None:
            _check_weights(f"reward.functions, {reference}", path)
    return check_reward_models(config, tokenizer, longest_prompt=prompts.longest_prompt)


def _check_critic(path: str, tokenizer: Any, *, longest: int) -> None:
    """UserError for a critic's start that can't be opened, or can't read what the policy writes."""
    context = context_length(path)
    _check_weights("critic.path", path)
    if context < longest:
        raise UserError(f"critic.path={path}: its context is {context} tokens, prompts and responses have up to "
                        f"{longest}")
    if not have_same_tokens(tokenizer, load_tokenizer(path)):
        raise UserError(f"critic.path={path}: its tokenizer isn't the policy's, whose tokens it is given as they are")


def _default_reward(config: Config, prompts: PromptSource) -> str:
    """The one function that stands in where none is named; UserError where the data don't call for one."""
    (function,) = resolve_functions(config, prompts.columns)
    return function.name


def _rewards(config: Config, prompts: PromptSource) -> tuple[tuple[RewardFunction, ...], list[str]]:
    """The functions that score these prompts; a warning for each that has nothing to say of some of them.

    UserError where one has nothing to say of any: nothing would be learned from it.
    """
    functions, warnings = resolve_functions(config, prompts.columns), []
    column = find_answer_column(config, prompts.columns)
    answers = prompts.column(column) if column else []
    for function in functions:
        num_silent = count_silent(function, answers)
        what = f"{prompts.source}: reward {function.name} can use the {column!r} of"
        if answers and num_silent == len(answers):
            raise UserError(f"{what} no row, e.g. {str(answers[0])[:60]!r} (data.answer_column names the column)")
        if num_silent:
            warnings.append(f"{what} {len(answers) - num_silent} rows of {len(answers)}: the others teach nothing")
    return functions, warnings


def _absolute(config: Config) -> Config:
    """Paths of users' files as every process finds them, whatever folder it runs in."""
    config = dataclasses.replace(config, plugins=[str(Path(path).expanduser().absolute()) for path in config.plugins])
    config = _with(config, "reward", functions=[_absolute_function(name) for name in config.reward.functions])
    config = _with(config, "rollout", function=_absolute_function(config.rollout.function))
    config = _with(config, "model", path=_local(config.model.path), tokenizer=_local(config.model.tokenizer))
    config = _with(config, "reference", path=_local(config.reference.path))
    config = _with(config, "critic", path=_local(config.critic.path))
    config = _with(config, "data", train=_local(config.data.train))
    return _with(config, "eval", data=_local(config.eval.data))


def _local(path: str | None) -> str | None:
    """An absolute path where there is such a file or folder; a hub name, or what is missing, stays as it is."""
    local = Path(path).expanduser() if path else None
    return str(local.absolute()) if local and local.exists() else path


def _check_weights(key: str, path: str) -> None:
    """UserError for a local model folder that holds no weights."""
    folder = Path(path)
    if folder.is_dir() and not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        raise UserError(f"{key}={path}: the folder holds no weights ({', '.join(WEIGHTS)})")


def _check_targets(config: Config) -> None:
    """UserError for train.lora.targets that a model which is trained, a critic's among them, hasn't."""
    critic = config.critic.path if algo.needs_critic(config.algo) else None
    for path in filter(None, (config.model.path, critic) if config.train.lora.rank else ()):
        check_targets(skeleton(path), config.train.lora)


def _check_reference(path: str, *, length_given: bool) -> None:
    """UserError for a reference that can't be opened. A folder's context need not be known where one is given."""
    if not (length_given and (Path(path) / "config.json").is_file()):
        context_length(path)
    _check_weights("reference.path", path)


def _absolute_function(name: str) -> str:
    model = reward_model_path(name)
    if model is not None:
        return f"{REWARD_MODEL}{_local(model)}"
    path, colon, function = name.rpartition(":")
    return f"{Path(path).expanduser().absolute()}:{function}" if colon and path.endswith(".py") else name


def _skipped(count: int, source: str) -> list[str]:
    return [f"{source}: {count} bad rows skipped (data.on_bad_row=skip)"] if count else []


def _with(config: Config, group: str, **values: object) -> Config:
    return dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **values)})
