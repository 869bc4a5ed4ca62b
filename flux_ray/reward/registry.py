"""Which functions reward a run.

Takes:  names of rules, registered ones, `path/to/file.py:function`, `package.module:function`, `model:PATH`; config.
Gives:  RewardFunction (signature, weight, options); `register_reward`, `get_reward`, `list_rewards`.
Knows:  what can be told before a run starts: names, options, weights, columns that a function needs.
Keeps:  the registry of this process.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from flux_ray.config import PromptDataConfig, RewardConfig
from flux_ray.errors import UserError, unknown
from flux_ray.names import reward_model_path, reward_name
from flux_ray.plugins import is_handed_over, load_function, same_function
from flux_ray.reward.rules import IN_MAIN_THREAD, RULES, SHAPING

ANSWER_COLUMNS = ("answer", "solution", "label")  # beside data.answer_column: what people call it
INNER_ANSWERS = ("ground_truth", "answer", "solution", "target", "value", "label")  # of a cell that is an object
#: What every function is given beside the data's columns, as TRL's GRPOTrainer gives it.
GIVEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})

Function = Callable[..., Any]

_registered: dict[str, tuple[Function, bool]] = {}


@dataclass(frozen=True)
class Signature:
    """How a function is called."""

    parameters: dict[str, inspect.Parameter]
    is_async: bool = False
    is_shaping: bool = False  # left out of the task reward


NONE_KNOWN: Mapping[str, Signature] = MappingProxyType({})


@dataclass(frozen=True)
class RewardFunction:
    """One function of a run, as the config has it."""

    name: str                # of its metric: reward/NAME
    reference: str           # as reward.functions names it
    call: Function | None    # None: it isn't imported here
    signature: Signature
    weight: float
    options: dict[str, object]  # keyword arguments from reward.options.NAME
    is_rule: bool            # its `answer` is the configured answer column, whatever that is called
    in_child: bool = True    # called in a child process, for it isn't ours
    is_model: bool = False   # scored by the actors of a reward model, which the worker asks in place of `call`

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return self.signature.parameters

    @property
    def is_shaping(self) -> bool:
        return self.signature.is_shaping


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
        if shaping:
            with contextlib.suppress(AttributeError, TypeError):   # a notebook's travels with it to other processes
                function.is_shaping = True   # type: ignore[attr-defined]
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


def of_set(reward: RewardConfig, names: Collection[str]) -> RewardConfig:
    """The section for a data set that is scored by these functions alone (none: by all of them)."""
    if not names:
        return reward
    own = [reward_name(function) for function in reward.functions]
    kept = [i for i, name in enumerate(own) if name in names]
    weights = reward.weights or [1.0] * len(own)
    return replace(reward, functions=[reward.functions[i] for i in kept], weights=[weights[i] for i in kept],
                   options={name: options for name, options in reward.options.items() if name in names})


def load_functions(
    reward: RewardConfig, signatures: Mapping[str, Signature] = NONE_KNOWN
) -> tuple[RewardFunction, ...]:
    """The functions that the config names (none: the default). UserError: a name, weight or option is wrong.

    `signatures`: of the `unknown_here` ones, as the child that has imported them tells; others are imported here.
    """
    references = reward.scored_by
    names = [reward_name(reference) for reference in references]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UserError(f"reward.functions names {sorted(repeated)[0]!r} twice: their metrics would fall together")
    weights = reward.weights or [1.0] * len(names)
    if len(weights) != len(names):
        raise UserError(f"reward.weights has {len(weights)} values for {len(names)} functions ({', '.join(names)})")
    for name in reward.options:
        if name not in names:
            raise UserError(f"reward.options: {unknown('function', name, names)}")
    functions = []
    for reference, weight in zip(references, weights, strict=True):
        options = dict(reward.options.get(reward_name(reference)) or {})
        function = _load(reference, signatures.get(reference), float(weight), options)
        _check_options(function)
        functions.append(function)
    return tuple(functions)


def _load(reference: str, known: Signature | None, weight: float, options: dict[str, object]) -> RewardFunction:
    if reward_model_path(reference) is not None:
        name = reward_name(reference)
        return RewardFunction(name, reference, None, Signature({}, is_async=True), weight, options, False, False, True)
    call = None if known is not None else function_of(reference)
    signature = known if known is not None else signature_of(function_of(reference), reference)
    is_rule = reference in RULES
    in_child = reference in IN_MAIN_THREAD or not (is_rule or is_ours(call))
    return RewardFunction(reward_name(reference), reference, call, signature, weight, options, is_rule, in_child)


def unknown_here(reward: RewardConfig) -> list[str]:
    """The functions of users' files and packages: who wants to know them asks a child process that imports them."""
    return [reference for reference in reward.functions
            if ":" in reference and reward_model_path(reference) is None
            and not reference.startswith("flux_ray.") and not is_handed_over(reference)]


def function_of(reference: str) -> Function:
    """The function itself, imported where it must be. UserError says what is missing."""
    return load_function(reference, option="reward.functions") if ":" in reference else get_reward(reference)


def is_ours(call: Function | None) -> bool:
    return str(getattr(call, "__module__", "")).startswith("flux_ray.")


def signature_of(call: Function, reference: str) -> Signature:
    """UserError for what can't be called by keywords."""
    if inspect.isclass(call):
        raise UserError(f"reward {reference} is a class: name a function, or an instance that can be called")
    try:
        parameters = dict(inspect.signature(call).parameters)
    except ValueError as error:
        raise UserError(f"reward {reference}: its arguments can't be told ({error}): wrap it in a function") from error
    for parameter in parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise UserError(f"reward {reference}: {parameter.name!r} can be given by its place alone, but rewards are "
                            "called by keywords: leave out the `/`")
    name = reward_name(reference)
    is_shaping = name in SHAPING if reference in RULES else (
        getattr(call, "is_shaping", False) is True or _registered.get(name, (None, False)) == (call, True))
    return Signature(parameters, is_async=is_async(call), is_shaping=is_shaping)


def is_async(call: Function) -> bool:
    """Whether calling it gives a coroutine; a callable object carries `async` on its `__call__`."""
    while isinstance(call, functools.partial):
        call = call.func
    return inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(type(call).__call__)


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
        assert function.call is not None
        no_samples: dict[str, object] = {name: [] for name in set(parameters) - own - {"columns"}}
        try:
            function.call(**no_samples, **function.options)
        except Exception as error:
            raise UserError(f"reward.options.{function.name}: {type(error).__name__}: {error}") from error


def find_answer_column(data: PromptDataConfig, columns: Collection[str]) -> str | None:
    """The column that the rules compare with: data.answer_column, else one called answer, solution or label.

    data.answer_column may lead into a cell: reward_model.ground_truth. One that was named and isn't there is not
    replaced by another.
    """
    named = data.answer_column
    if named in columns or named.partition(".")[0] in columns:
        return named
    others = ANSWER_COLUMNS if named == ANSWER_COLUMNS[0] else ()
    return next((name for name in others if name in columns), None)


def answer_in(columns: Mapping[str, object], column: str) -> object:
    """A row's answer. None where its cell has none."""
    if column in columns:
        return columns[column]
    head, *keys = column.split(".")
    cell = columns.get(head)
    for key in keys:
        cell = cell.get(key) if isinstance(cell, Mapping) else None
    return cell


def answers_in(column: str, cells_of: Callable[[str], Sequence[object]], columns: Collection[str]) -> list[object]:
    """Every row's answer. UserError where that is no answer but an object that holds one, or no row has one.

    `cells_of`: the cells of a column of the data.
    """
    head = column if column in columns else column.partition(".")[0]
    cells = cells_of(head)
    answers = [answer_in({head: cell}, column) for cell in cells]
    for answer in answers:
        held = answer if isinstance(answer, Mapping) else next(
            (one for one in answer if isinstance(one, Mapping)) if isinstance(answer, list) else iter(()), None)
        if isinstance(held, Mapping):
            keys = ", ".join(map(str, held)) or "nothing"
            inner = next((key for key in INNER_ANSWERS if key in held), next(iter(held), "KEY"))
            raise UserError(f"column {column!r} holds objects (of {keys}): name the answer in them "
                            f"(data.answer_column={column}.{inner})")
    if cells and head != column and all(answer is None for answer in answers):
        first = next((cell for cell in cells if cell is not None), None)
        known = ", ".join(map(str, first)) if isinstance(first, Mapping) else f"{type(first).__name__}, no object"
        raise UserError(f"data.answer_column={column}: no row has it (column {head!r} holds {known})")
    return answers


def count_silent(function: RewardFunction, answers: Sequence[object]) -> int:
    """Of how many of these answers a rule that compares with them can say nothing (numeric: they hold no number)."""
    if not function.is_rule or "answer" not in function.parameters:
        return 0
    assert function.call is not None
    nothing = [""] * len(answers)
    return function.call(nothing, nothing, answers, **function.options).count(None)


def resolve_functions(
    reward: RewardConfig, data: PromptDataConfig, columns: Collection[str],
    signatures: Mapping[str, Signature] = NONE_KNOWN,
) -> tuple[RewardFunction, ...]:
    """`load_functions`, with what they need looked for among the data's columns. UserError names what is missing."""
    answer_column = find_answer_column(data, columns)
    if answer_column is None and data.answer_column != ANSWER_COLUMNS[0]:
        raise UserError(f"data.answer_column: {unknown('column', data.answer_column, columns)}")
    if not reward.functions and answer_column is None:
        raise UserError(
            "no reward: reward.functions is empty, and the data have no answer, solution or label column (columns "
            f"beside the prompt: {', '.join(sorted(columns)) or 'none'}). Name the column (data.answer_column=COLUMN), "
            f"rules (reward.functions=[...] of {', '.join(RULES)}), or a function of your own "
            "(reward.functions=[path/to/file.py:my_reward], or @register_reward in a plugin), or a reward model "
            "(reward.functions=[model:PATH])"
        )
    functions = load_functions(reward, signatures)
    for function in functions:
        available = {*columns, *GIVEN, *function.options, *(["answer"] if answer_column else [])}
        for name, parameter in function.parameters.items():
            named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            if named and parameter.default is parameter.empty and name not in available:
                hint = " (data.answer_column names it)" if function.is_rule else ""
                raise UserError(f"reward {function.name} needs {unknown('column', name, columns)}{hint}")
    return functions
