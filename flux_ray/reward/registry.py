"""Which functions reward a run.

Takes:  names of rules, registered names, `path/to/file.py:function` or `package.module:function`; the config.
Gives:  RewardFunction (callable, weight, options); `register_reward`, `get_reward`, `list_rewards`, `load_function`.
Knows:  what can be told before a run starts: names, imports, options, weights, columns that a function needs.
Keeps:  the registry; files already imported.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from flux_ray.config import Config
from flux_ray.errors import UserError, unknown
from flux_ray.reward.rules import RULES, SHAPING

ANSWER_COLUMNS = ("answer", "solution", "label")  # beside data.answer_column: what people call it
DEFAULT_REWARD = "numeric_or_exact"
#: What every function is given beside the data's columns, as TRL's GRPOTrainer gives it.
GIVEN = frozenset({"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"})

Function = Callable[..., Any]

_registered: dict[str, tuple[Function, bool]] = {}
_modules: dict[str, ModuleType] = {}


@dataclass(frozen=True)
class RewardFunction:
    """One function of a run, as the config has it."""

    name: str                # of its metric: reward/NAME
    call: Function
    weight: float
    options: dict[str, Any]  # keyword arguments from reward.options.NAME
    is_rule: bool            # its `answer` is the configured answer column, whatever that is called
    is_shaping: bool         # left out of the task reward

    @property
    def parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.call).parameters)


def register_reward(name: str, *, shaping: bool = False) -> Callable[[Function], Function]:
    """Decorator: make a function known as `name` in `reward.functions`. `shaping`: it isn't part of the task reward.

    UserError where the name is taken.
    """

    def register(function: Function) -> Function:
        if name in RULES or name in _registered:
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


def load_function(reference: str, *, what: str = "reward.functions") -> Function:
    """The function that `path/to/file.py:name` or `package.module:name` means. A file is imported once a process.

    UserError, in one line, where the file, the function or something that the file imports is missing.
    """
    place, _, name = reference.rpartition(":")
    if not place or not name:
        raise UserError(f"{what}: {reference!r} is not of the form path/to/file.py:function")
    module = _import_file(place, what) if place.endswith(".py") else _import_module(place, reference, what)
    if not hasattr(module, name):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{what}: {place}: {unknown('function', name, functions)}")
    function = getattr(module, name)
    if not callable(function):
        raise UserError(f"{what}: {reference}: {name} is {type(function).__name__}, not a function")
    return function


def _import_file(place: str, what: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{what}: {place}: no such file")
    name = f"{path.stem}_{hashlib.blake2b(str(path).encode(), digest_size=4).hexdigest()}"
    if name in _modules:
        return _modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # a file beside it can be imported, as when it is run as a script
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{what}: {place}{_line_in(path, error)}: {type(error).__name__}: {error}") from error
    _modules[name] = module
    return module


def _import_module(place: str, reference: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except Exception as error:
        raise UserError(f"{what}: {reference}: {type(error).__name__}: {error}") from error


def _line_in(path: Path, error: Exception) -> str:
    """` line N`: where in the file the error came up; nothing where it didn't."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f" line {error.lineno}"
    lines, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f" line {lines[-1]}" if lines else ""


def load_functions(config: Config) -> tuple[RewardFunction, ...]:
    """The functions that the config names (none: numeric_or_exact). UserError: a name, weight or option is wrong."""
    references = config.reward.functions or [DEFAULT_REWARD]
    names = [reference.rpartition(":")[2] for reference in references]
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
        call = load_function(reference) if ":" in reference else get_reward(reference)
        options = dict(config.reward.options.get(name) or {})
        is_rule = call is RULES.get(name)
        is_shaping = name in SHAPING if is_rule else _registered.get(name, (None, False)) == (call, True)
        function = RewardFunction(name, call, float(weight), options, is_rule, is_shaping)
        _check_options(function)
        functions.append(function)
    return tuple(functions)


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


def find_answer_column(config: Config, columns: Collection[str]) -> str | None:
    """The column that the rules compare with: data.answer_column, else one called answer, solution or label."""
    return next((name for name in (config.data.answer_column, *ANSWER_COLUMNS) if name in columns), None)


def resolve_functions(config: Config, columns: Collection[str]) -> tuple[RewardFunction, ...]:
    """`load_functions`, with what they need looked for among the data's columns. UserError names what is missing."""
    answer_column = find_answer_column(config, columns)
    if not config.reward.functions and answer_column is None:
        raise UserError(
            "no reward: reward.functions is empty, and the data have no answer, solution or label column (columns "
            f"beside the prompt: {', '.join(sorted(columns)) or 'none'}). Name the column (data.answer_column=COLUMN), "
            f"rules (reward.functions=[...] of {', '.join(RULES)}), or a function of your own "
            "(reward.functions=[path/to/file.py:my_reward], or @register_reward in a plugin)"
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
