"""Which functions reward a run.

Takes:  names of rules, registered ones, `path/to/file.py:function`, `package.module:function`, `model:PATH`; config.
Gives:  RewardFunction (callable, weight, options); `register_reward`, `get_reward`, `list_rewards`.
Knows:  what can be told before a run starts: names, imports, options, weights, columns that a function needs.
Keeps:  the registry of this process.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from flux_ray.config import PolicyGradientConfig
from flux_ray.errors import UserError, unknown
from flux_ray.names import reward_model_path, reward_name
from flux_ray.plugins import load_function, same_function
from flux_ray.reward.rules import RULES, SHAPING

ANSWER_COLUMNS = ("answer", "solution", "label")  # beside data.answer_column: what people call it
#: What every function is given beside the data's columns, as TRL's GRPOTrainer gives it.
GIVEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})

Function = Callable[..., Any]

_registered: dict[str, tuple[Function, bool]] = {}


@dataclass(frozen=True)
class RewardFunction:
    """One function of a run, as the config has it."""

    name: str                # of its metric: reward/NAME
    call: Function
    weight: float
    options: dict[str, Any]  # keyword arguments from reward.options.NAME
    is_rule: bool            # its `answer` is the configured answer column, whatever that is called
    is_shaping: bool         # left out of the task reward
    is_model: bool = False   # scored by the actors of a reward model, which the worker asks in place of `call`

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.call).parameters)


def register_reward(name: str, *, shaping: bool = False) -> Callable[[Function], Function]:
    """Register a reward for `reward.functions`.

    Args:
        name: For `reward.functions`.
        shaping: It isn't part of the task reward.

    Raises:
        UserError: The name is taken.
    """

    def register(function: Function) -> Function:
        if name in RULES or (name in _registered and not same_function(_registered[name][0], function)):
            raise UserError(f"reward {name!r} is registered already")
        _registered[name] = (function, shaping)
        return function

    return register


def get_reward(name: str) -> Function:
    """The function of a rule's or a registered name. UserError with the nearest name where there is none."""
    if name in RULES:
        return RULES[name]
    if name not in _registered:
        raise unknown("reward", name, list_rewards())
    return _registered[name][0]


def list_rewards() -> list[str]:
    return sorted({*RULES, *_registered})


def load_functions(config: PolicyGradientConfig) -> tuple[RewardFunction, ...]:
    """The functions that the config names (none: the default). UserError: a name, weight or option is wrong."""
    references = config.reward.scored_by
    names = [reward_name(reference) for reference in references]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"reward.functions names {sorted(repeated)[0]!r} twice: their metrics would fall together")
    weights = config.reward.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"reward.weights has {len(weights)} values for {len(names)} functions ({', '.join(names)})")
    for name in config.reward.options:
        if name not in names:
            raise UserError(f"reward.options: {unknown('function', name, names)}")
    functions = []
    for reference, name, weight in zip(references, names, weights, strict=True):
        is_model = reward_model_path(reference) is not None
        call = _by_actors if is_model else _function(reference)
        options = dict(config.reward.options.get(name) or {})
        is_rule = call is RULES.get(name)
        is_shaping = name in SHAPING if is_rule else _registered.get(name, (None, False)) == (call, True)
        function = RewardFunction(name, call, float(weight), options, is_rule, is_shaping, is_model)
        _check_options(function)
        functions.append(function)
    return tuple(functions)


def _function(reference: str) -> Function:
    return load_function(reference, option="reward.functions") if ":" in reference else get_reward(reference)


def _by_actors() -> list[float]:
    raise AssertionError("a reward model's scores are asked of its actors")


def _check_options(function: RewardFunction) -> None:
    """UserError for an option that the function doesn't have, or a value that a rule doesn't take."""
    parameters = function.parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    own = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    known = own if function.is_rule else set(parameters) - GIVEN
    for option in function.options:
        if option not in known and (function.is_rule or not takes_any):
            raise UserError(f"reward.options.{function.name}: {unknown('option', option, known)}")
    if function.is_rule:
        no_samples: dict[str, Any] = {name: [] for name in set(parameters) - own - {"columns"}}
        try:
            function.call(**no_samples, **function.options)
        except Exception as error:
            raise UserError(f"reward.options.{function.name}: {type(error).__name__}: {error}") from error


def find_answer_column(config: PolicyGradientConfig, columns: Collection[str]) -> str | None:
    """The column that the rules compare with: data.answer_column, else one called answer, solution or label."""
    return next((name for name in (config.data.answer_column, *ANSWER_COLUMNS) if name in columns), None)


def count_silent(function: RewardFunction, answers: Sequence[Any]) -> int:
    """Of how many of these answers a rule that compares with them can say nothing (numeric: they hold no number)."""
    if not function.is_rule or "answer" not in function.parameters:
        return 0
    nothing = [""] * len(answers)
    return function.call(nothing, nothing, answers, **function.options).count(None)


def resolve_functions(config: PolicyGradientConfig, columns: Collection[str]) -> tuple[RewardFunction, ...]:
    """`load_functions`, with what they need looked for among the data's columns. UserError names what is missing."""
    answer_column = find_answer_column(config, columns)
    if not config.reward.functions and answer_column is None:
        raise UserError(
            "no reward: reward.functions is empty, and the data have no answer, solution or label column (columns "
            f"beside the prompt: {', '.join(sorted(columns)) or 'none'}). Name the column (data.answer_column=COLUMN), "
            f"rules (reward.functions=[...] of {', '.join(RULES)}), or a function of your own "
            "(reward.functions=[path/to/file.py:my_reward], or @register_reward in a plugin), or a reward model "
            "(reward.functions=[model:PATH])"
        )
    functions = load_functions(config)
    for function in functions:
        available = {*columns, *GIVEN, *function.options, *(["answer"] if answer_column else [])}
        for name, parameter in function.parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and name not in available:
                hint = " (data.answer_column names it)" if function.is_rule else ""
                raise UserError(f"reward {function.name} needs {unknown('column', name, columns)}{hint}")
    return functions
