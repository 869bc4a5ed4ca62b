"""Checks a run before an actor starts: all that can be refused, in one order.

Takes:  a Config.
Gives:  Prepared: the config with open options filled in, the data to learn from, the warnings.
Knows:  which part checks what; the order: values, then files, then the model's own limits.
Never:  starts an actor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_ray import algo
from flux_ray.algo.check import check as check_algo
from flux_ray.algo.filters import check_filter
from flux_ray.algo.trial import try_registered
from flux_ray.config import (
    PAIRS,
    READERS,
    Config,
    PolicyGradientConfig,
    PPOConfig,
    ReferencedConfig,
    RewardConfig,
    changed,
    options_of,
    validate,
    value_of,
)
from flux_ray.data import PromptSource, are_groups
from flux_ray.data.preferences import CHOSEN, REJECTED
from flux_ray.data.prompts import PromptSet
from flux_ray.data.sets import TRAIN, map_paths, read_sets
from flux_ray.errors import UserError
from flux_ray.model import (
    check_routers,
    check_targets,
    context_length,
    load_tokenizer,
    longest_context,
    policy_traits,
    score_traits,
    skeleton,
)
from flux_ray.names import REWARD_MODEL, reward_model_path
from flux_ray.offline import data as offline_data
from flux_ray.offline.data import OfflineData
from flux_ray.plugins import HANDED_OVER, file_of_module, load_plugins
from flux_ray.records import LoopState
from flux_ray.reward import (
    RewardFunction,
    answers_in,
    ask_signatures,
    count_silent,
    find_answer_column,
    resolve_functions,
)
from flux_ray.reward.model import check_reward_models, have_same_tokens
from flux_ray.reward.registry import Signature, load_functions, of_set
from flux_ray.rollout.check import check_engine_args
from flux_ray.rollout.functions import get_rollout
from flux_ray.rollout.routed_experts import check_returned
from flux_ray.run import monitoring, resume
from flux_ray.train import check_deepspeed_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_OPENING_CHARS = 1000  # of a prompt's end, looked at for reward.opening
WEIGHTS = ("*.safetensors", "*.bin", "*.index.json")  # files that a model folder's weights may be in


@dataclass(frozen=True)
class Rollouts:
    """Prompts to sample from and learn, and prompts to evaluate on."""

    train: PromptSource
    evaluation: PromptSource | None  # None where eval.data names nothing

    @property
    def longest_prompt(self) -> int:
        return max(source.longest_prompt for source in (self.train, self.evaluation) if source is not None)


Task = Rollouts | OfflineData


@dataclass(frozen=True)
class Prepared:
    config: Config
    task: Task
    start: LoopState
    checkpoint: Path | None  # to load before the first step; None: the run starts anew
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()  # to be said, and no reason to worry

    @property
    def needs_reference(self) -> bool:
        """Whether there are reference actors."""
        return algo.needs_reference(self.config.algo) and not algo.reference_is_base(self.config)


@dataclass
class Draft:
    """What the checks have found so far."""

    config: Config
    warnings: list[str] = field(default_factory=list)
    start: LoopState = field(default_factory=lambda: LoopState(step=0))
    checkpoint: Path | None = None
    task: Task | None = None
    tokenizer: Any = None  # a PreTrainedTokenizerBase, once the model is checked
    signatures: Mapping[str, Signature] = field(default_factory=dict)  # of users' rewards

    @property
    def path(self) -> str:
        return str(self.config.model.path)

    @property
    def context(self) -> int:
        return self.config.rollout.max_model_len or context_length(self.path)


def prepare(config: Config) -> Prepared:
    """Check it all. UserError for the first mistake: one line with key, file and row."""
    # We tell in one line of a hub that can't be reached; its client would first tell of each of its tries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    draft = Draft(_absolute(config))
    for check in CHECKS:
        check(draft)
    assert draft.task is not None
    return Prepared(draft.config, draft.task, draft.start, draft.checkpoint, tuple(draft.warnings),
                    tuple(resume.changes(draft.config)))


def _check_values(draft: Draft) -> None:
    load_plugins(draft.config.plugins)
    draft.config = validate(draft.config)
    monitoring.check(draft.config)
    draft.warnings += check_algo(draft.config)
    try_registered(draft.config)


def _check_options_of_libraries(draft: Draft) -> None:
    if isinstance(draft.config, PolicyGradientConfig):
        check_engine_args(draft.config.rollout)
        check_returned(draft.config)
    check_deepspeed_options(draft.config.train)


def _check_rollout_function(draft: Draft) -> None:
    if isinstance(draft.config, PolicyGradientConfig):
        get_rollout(draft.config.rollout.function)


def _check_model(draft: Draft) -> None:
    assert draft.context
    _check_context(draft.config)
    _check_weights("model.path", draft.path)
    _check_traits(draft.config)
    _check_parts_of_model(draft.config)
    draft.tokenizer = load_tokenizer(draft.config.model.tokenizer or draft.path)


def _check_checkpoint(draft: Draft) -> None:
    """Where a run that is resumed goes on."""
    start = resume.start(draft.config)
    draft.config, draft.checkpoint, draft.start = start.config, start.checkpoint, start.state
    draft.warnings += start.warnings


def _check_reference(draft: Draft) -> None:
    """A reference that can't be opened. A folder's context need not be known where one is given."""
    config = draft.config
    path = config.reference.path if isinstance(config, ReferencedConfig) else None
    if path is None or not algo.needs_reference(config.algo) or algo.reference_is_base(config):
        return
    if not (config.rollout.max_model_len is not None and (Path(path) / "config.json").is_file()):
        context_length(path)
    _check_weights("reference.path", path)
    policy_traits(path, config.model.attention)


def _read_data(draft: Draft) -> None:
    """The data to learn from: of the objective's kind, or groups with rewards, which their columns show."""
    config = draft.config
    if not isinstance(config, PolicyGradientConfig):
        offline = offline_data.read(config, draft.tokenizer, context_length=draft.context)
        draft.task, draft.warnings = offline, [*draft.warnings, *offline.warnings]
        return
    sets = read_sets(config, TRAIN)
    if not any(are_groups(one.rows) for one in sets):
        prompts = PromptSource(sets, config, draft.tokenizer, context_length=draft.context, role=TRAIN)
        draft.warnings += [*prompts.warnings(), *_pairs(config, prompts)]
        draft.task = Rollouts(prompts, None)
        return
    if isinstance(config, PPOConfig):
        raise UserError(f"data.train={config.data.train} holds groups with rewards: {config.algo.name} learns from "
                        "what it samples itself, scored by reward.functions")
    draft.config, offline = offline_data.read_groups(sets, config, draft.tokenizer, context_length=draft.context)
    draft.task, draft.warnings = offline, [*draft.warnings, *offline.warnings]


def _check_rewards(draft: Draft) -> None:
    """Functions, reward models and the filter, of a task with rollouts."""
    config, task = draft.config, draft.task
    if not isinstance(task, Rollouts) or not isinstance(config, PolicyGradientConfig):
        return
    functions = list(config.reward.functions) or [_default_reward(config, task.train)]
    config = draft.config = changed(config, {"reward.functions": functions})
    draft.warnings += _reward_models(config, draft.tokenizer, task.train)
    if isinstance(config, PPOConfig) and config.critic.path:
        _check_critic(config.critic.path, draft.tokenizer,
                      longest=task.train.longest_prompt + config.rollout.max_tokens)
    config = draft.config = changed(
        config, {"reward.opening": _opening(config.reward.opening, draft.tokenizer, task.train)})
    draft.signatures = ask_signatures(config)
    resolved, silent = _rewards(config, task.train, draft.signatures)
    draft.warnings += silent
    check_filter(config, [function.name for function in resolved])


def _read_evaluation(draft: Draft) -> None:
    config, task = draft.config, draft.task
    if not isinstance(task, Rollouts) or not isinstance(config, PolicyGradientConfig):
        return
    if config.eval.data or config.eval.share:
        evaluation = PromptSource.for_eval(config, draft.tokenizer, context_length=draft.context)
        draft.warnings += [*evaluation.warnings(), *_rewards(config, evaluation, draft.signatures)[1]]
        draft.task = Rollouts(task.train, evaluation)


#: In their order: cheap checks come first, and the data are read after all that they need.
CHECKS: tuple[Callable[[Draft], None], ...] = (
    _check_values,
    _check_options_of_libraries,
    _check_rollout_function,
    _check_model,
    _check_checkpoint,
    _check_reference,
    _read_data,
    _check_rewards,
    _read_evaluation,
)


def _pairs(config: PolicyGradientConfig, prompts: PromptSource) -> list[str]:
    """A warning where only the prompts of preference pairs are read; UserError where no reward is named either."""
    if not {CHOSEN, REJECTED} <= prompts.columns:
        return []
    learners = ", ".join(name for name, cls in READERS.items() if cls.learns_from == PAIRS)
    what = (f"{prompts.source} holds preference pairs ({CHOSEN}, {REJECTED}), of which algo.name={config.algo.name} "
            f"reads the prompts alone ({learners} learn from pairs)")
    if not config.reward.functions and find_answer_column(config.data, prompts.columns) is None:
        raise UserError(f"no reward: {what}, and reward.functions names nothing that scores what it samples")
    return [what]


def _reward_models(
    config: PolicyGradientConfig, tokenizer: PreTrainedTokenizerBase, prompts: PromptSource
) -> list[str]:
    for reference in config.reward.functions:
        path = reward_model_path(reference)
        if path == "":
            raise UserError(f"reward.functions: {reference!r} names no reward model: {REWARD_MODEL}PATH does")
        if path is not None:
            _check_weights(f"reward.functions, {reference}", path)
    return check_reward_models(config, tokenizer, longest_prompt=prompts.longest_prompt)


def _check_critic(path: str, tokenizer: PreTrainedTokenizerBase, *, longest: int) -> None:
    """UserError for a critic's start that can't be opened, or can't read what the policy writes."""
    context = context_length(path)
    _check_weights("critic.path", path)
    if context < longest:
        raise UserError(f"critic.path={path}: its context is {context} tokens, prompts and responses have up to "
                        f"{longest}")
    if not have_same_tokens(tokenizer, load_tokenizer(path)):
        raise UserError(f"critic.path={path}: its tokenizer isn't the policy's, whose tokens it is given as they are")


def _opening(opening: str | None, tokenizer: PreTrainedTokenizerBase, prompts: PromptSource) -> str | None:
    """`reward.opening` as the prompts end in it, with their blanks after it. UserError where they don't end in it."""
    if not (opening or "").strip():
        return None
    end = tokenizer.decode(prompts.prompt(0).token_ids.tolist(), skip_special_tokens=False)[-MAX_OPENING_CHARS:]
    start = len(end.rstrip()) - len(str(opening).rstrip())
    if start < 0 or not end[start:].startswith(str(opening).rstrip()):
        raise UserError(f"reward.opening={opening!r}: the prompts end in {end[-40:]!r}, not in it: the template (or "
                        "data.prompt_template) doesn't begin the answer so")
    return end[start:]


def _default_reward(config: PolicyGradientConfig, prompts: PromptSource) -> str:
    """The one function that stands in where none is named; UserError where the data don't call for one."""
    functions = [resolve_functions(config.reward, one.config.data, one.columns) for one in prompts.sets]
    return functions[0][0].name


def _rewards(
    config: PolicyGradientConfig, prompts: PromptSource, signatures: Mapping[str, Signature]
) -> tuple[tuple[RewardFunction, ...], list[str]]:
    """The run's functions; a warning for each that has no reward for some of the prompts that it scores.

    UserError where a function lacks a column of a set, or has no reward for any prompt: nothing would be learned.
    """
    warnings = [line for one in prompts.sets for line in _silent(config.reward, one, signatures)]
    return load_functions(config.reward, signatures), warnings


def _silent(reward: RewardConfig, prompts: PromptSet, signatures: Mapping[str, Signature]) -> list[str]:
    """The warnings about one set, which may have functions of its own among the run's."""
    of_it, data = of_set(reward, prompts.data_set.rewards), prompts.config.data
    functions, warnings = resolve_functions(of_it, data, prompts.columns, signatures), []
    column = find_answer_column(data, prompts.columns)
    answers = []
    if column is not None and any(function.is_rule and "answer" in function.parameters for function in functions):
        answers = answers_in(column, prompts.column, prompts.columns)
    for function in functions:
        num_silent = count_silent(function, answers)
        what = f"{prompts.source}: reward {function.name} can use the {column!r} of"
        if answers and num_silent == len(answers):
            raise UserError(f"{what} no row, e.g. {str(answers[0])[:60]!r} (data.answer_column names the column)")
        if num_silent:
            warnings.append(f"{what} {len(answers) - num_silent} rows of {len(answers)}: the others teach nothing")
    return warnings


def _absolute(config: Config) -> Config:
    """The config with absolute paths, which every process finds, whatever folder it runs in."""
    own = dict(options_of(type(config)))
    return changed(config, {key: absolute(value_of(config, key)) for key, absolute in PATHS.items() if key in own})


def _local(path: str | None) -> str | None:
    """An absolute path where there is such a file or folder; a hub name, or a missing path, stays as it is."""
    local = Path(path).expanduser() if path else None
    return str(local.absolute()) if local and local.exists() else path


def _check_weights(key: str, path: str) -> None:
    """UserError for a local model folder that holds no weights."""
    folder = Path(path)
    if folder.is_dir() and not any(True for pattern in WEIGHTS for _ in folder.glob(pattern)):
        raise UserError(f"{key}={path}: the folder holds no weights ({', '.join(WEIGHTS)})")


def _check_traits(config: Config) -> None:
    """UserError for a model, or a critic's, that computes what our code, or the chosen attention, doesn't."""
    trained = score_traits if config.is_score else policy_traits
    trained(str(config.model.path), config.model.attention)
    if isinstance(config, PPOConfig):
        score_traits(config.critic.path or str(config.model.path), config.model.attention)


def _check_context(config: Config) -> None:
    """UserError for a context that the model has no positions for."""
    asked, longest = config.rollout.max_model_len, longest_context(str(config.model.path))
    if asked is not None and longest is not None and asked > longest:
        raise UserError(f"rollout.max_model_len={asked} is more than the {longest} positions of model.path="
                        f"{config.model.path} (longrope and dynamic rotary positions: those before they change): "
                        f"set it to {longest} at most")


def _check_parts_of_model(config: Config) -> None:
    """UserError for options of parts that the model, or the critic's, doesn't have: train.lora.targets, routers."""
    check_routers(lambda: skeleton(str(config.model.path)), config)
    critic = config.critic.path if isinstance(config, PPOConfig) else None
    for path in filter(None, (config.model.path, critic) if config.train.lora.rank else ()):
        check_targets(skeleton(path), config.train.lora)


def _absolute_function(name: str) -> str:
    model = reward_model_path(name)
    if model is not None:
        return f"{REWARD_MODEL}{_local(model)}"
    path, colon, function = name.rpartition(":")
    if name.startswith(HANDED_OVER):
        return name
    if colon and not path.endswith(".py"):
        file = file_of_module(path)  # beneath this folder, which other processes needn't be in
        return f"{file}:{function}" if file is not None else name
    return f"{Path(path).expanduser().absolute()}:{function}" if colon and path.endswith(".py") else name


def _each(absolute: Callable[[str], str]) -> Callable[[list[str]], list[str]]:
    return lambda names: [absolute(name) for name in names]


#: Options that are paths, or hold some ► how their value becomes absolute.
PATHS: dict[str, Callable[[Any], Any]] = {
    "plugins": _each(lambda path: str(Path(path).expanduser().absolute())),
    "reward.functions": _each(_absolute_function), "rollout.function": _absolute_function,
    "model.path": _local, "model.tokenizer": _local, "reference.path": _local, "critic.path": _local,
    "data.train": lambda given: map_paths(given, _local), "eval.data": lambda given: map_paths(given, _local),
}
