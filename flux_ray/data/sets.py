"""The data sets that `data.train` and `eval.data` name, each with the options that it is read with.

Takes:  the run's config: a path, a list of paths, one set as a mapping, or several by their names.
Gives:  `train_sets`, `eval_sets`; `read_sets`: their rows, shaped, without those that are held out; `map_paths`.
Knows:  what of a set's mapping is its own (path, weight, rewards, max_tokens); everything else is an option of `data`.
Never:  reads a prompt.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from flux_ray import config as configs
from flux_ray.config import DataConfig, EvaluatedConfig, PolicyGradientConfig, PromptDataConfig
from flux_ray.data.files import known_formats
from flux_ray.data.forms import shaped
from flux_ray.data.order import stable_seed
from flux_ray.data.rows import Row, Rows
from flux_ray.data.sources import load_rows
from flux_ray.errors import UserError, unknown
from flux_ray.names import reward_name

TRAIN, EVAL = "train", "eval"  # what a set is for
PATH, WEIGHT, REWARDS, MAX_TOKENS = "path", "weight", "rewards", "max_tokens"
OF_THE_RUN = ("train", "shuffle")  # options of data that no set has for itself
NAME = re.compile(r"[A-Za-z0-9][\w.-]*")  # it stands in metrics' names


C = TypeVar("C", bound=EvaluatedConfig)


@dataclass(frozen=True)
class DataSet(Generic[C]):
    """One set: where its rows are, and the run's config with what it has for itself."""

    name: str  # "" where there is one alone
    source: Any  # a path, a list of Path objects, or rows in memory
    config: C
    weight: float = 1.0  # its share of the prompts, relative to the others'
    rewards: tuple[str, ...] = ()  # the functions that score it; none: all
    max_tokens: int | None = None  # of a response to it; none: rollout.max_tokens


@dataclass(frozen=True)
class LoadedSet(Generic[C]):
    data_set: DataSet[C]
    rows: Rows


def train_sets(config: C, source: object = None) -> list[DataSet[C]]:
    """The sets of `data.train`, or `source` in their place. UserError names what is wrong with them."""
    return _sets(source, config.data.train, "data.train", config, {})


def eval_sets(config: C, source: object = None) -> list[DataSet[C]]:
    """The sets of `source`, else of `eval.data`, else (eval.share) of data.train, which holds a share of them out."""
    if source is None and config.eval.data is None and config.eval.share:
        return train_sets(config)
    of_eval: Row = {"split": config.eval.split, "max_rows": config.eval.max_rows}
    return _sets(source, config.eval.data, "eval.data", config, of_eval)


def read_sets(config: C, role: str, source: object = None, *, column: str | None = None) -> list[LoadedSet[C]]:
    """The sets with their rows. UserError says what is wrong, and where.

    column: where a text without columns lies (none: data.prompt_column).
    """
    read = []
    for one in train_sets(config, source) if role == TRAIN else eval_sets(config, source):
        data = one.config.data
        rows = load_rows(one.source, split=data.split, max_rows=data.max_rows,
                         column=column or data.prompt_column, on_bad_row=data.on_bad_row)
        rows = _with_answer(shaped(rows, data), data, config.data)
        if config.eval.share and config.eval.data is None:
            rows = _part(rows, one.config, held_out=role == EVAL)
        read.append(LoadedSet(one, rows))
    return read


def _with_answer(rows: Rows, data: DataConfig, of_the_run: DataConfig) -> Rows:
    """The rows with the set's own answer column under the name that the run's rewards look for."""
    if not isinstance(data, PromptDataConfig) or not isinstance(of_the_run, PromptDataConfig):
        return rows
    own = data.answer_column
    if own == of_the_run.answer_column or own not in rows.columns:
        return rows
    return rows.having(**{of_the_run.answer_column: lambda row: row[own]})


def map_paths(given: object, change: Callable[[str], str | None]) -> object:
    """What `data.train` or `eval.data` is with every path in it changed."""
    if isinstance(given, str):
        return change(given)
    if isinstance(given, list):
        return [map_paths(path, change) for path in given]
    if not isinstance(given, Mapping):
        return given
    if PATH in given:
        return {**given, PATH: map_paths(given[PATH], change)}
    return {name: map_paths(one, change) for name, one in given.items()}


def _sets(source: object, configured: object, key: str, config: C, base: Row) -> list[DataSet[C]]:
    """The sets of `source`, or (None) of what the config has under `key`. What is no name is rows in memory."""
    given = configured if source is None else source
    if source is not None and not isinstance(source, (str, Mapping)):
        return [DataSet("", source, _configured(config, base, key))]
    if given is None:
        raise UserError(f"{key} is not set: name a file ({known_formats()}), a folder, or a hub data set")
    if not isinstance(given, Mapping) or PATH in given:
        return [_one("", given, key, config, base)]
    if not given:
        raise UserError(f"{key} names no set")
    return [_one(str(name), value, f"{key}.{name}", config, base) for name, value in given.items()]


def _one(name: str, given: object, key: str, config: C, base: Row) -> DataSet[C]:
    if name and not NAME.fullmatch(name):
        raise UserError(f"{key}: the name of a set has letters, digits, '_', '-' and '.' alone")
    options = dict(given) if isinstance(given, Mapping) else {PATH: given}
    path, weight, rewards = options.pop(PATH, None), options.pop(WEIGHT, 1.0), options.pop(REWARDS, [])
    each = path if isinstance(path, list) else [path]
    if not path or not all(isinstance(one, str) and one for one in each):
        raise UserError(f"{key}: a set is a path, a list of paths, or a mapping with {PATH}; got {given!r}")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise UserError(f"{key}.{WEIGHT} must be a number > 0, got {weight!r}")
    if weight != 1.0 and key.startswith("eval.data"):
        raise UserError(f"{key}.{WEIGHT}={weight}: an evaluation takes every prompt once")
    max_tokens = _response_limit(config, options.pop(MAX_TOKENS, None), key)
    scored_by = _scored_by(config, rewards, key)
    paths = [Path(one) for one in path] if isinstance(path, list) else path
    return DataSet(name, paths, _configured(config, {**base, **options}, key), float(weight), scored_by, max_tokens)


def _response_limit(config: EvaluatedConfig, given: object, key: str) -> int | None:
    """The longest response to a prompt of the set: within the run's, by which memory and L_max are reckoned."""
    if given is None:
        return None
    if not isinstance(config, PolicyGradientConfig):
        raise UserError(f"{key}.{MAX_TOKENS}: algo.name={config.algo.name} samples nothing: leave it out")
    longest = config.rollout.max_tokens
    if isinstance(given, bool) or not isinstance(given, int) or not 1 <= given <= longest:
        raise UserError(f"{key}.{MAX_TOKENS} must be a number from 1 to rollout.max_tokens={longest}, got {given!r}")
    return given


def _configured(config: C, options: Row, key: str) -> C:
    """The config with these options of `data`. UserError for one that a set hasn't, or a wrong value."""
    known = {field.name for field in dataclasses.fields(config.data)} - set(OF_THE_RUN)
    for name in options:
        if name not in known:
            raise UserError(f"{key}: {unknown('option', name, {*known, PATH, WEIGHT, REWARDS, MAX_TOKENS})}")
    written = {f"data.{name}": value for name, value in options.items()}
    typed = configs.from_dict({"algo.name": config.algo.name, **written})
    changes = {f"data.{name}": getattr(typed.data, name) for name in options}
    try:
        return configs.check_data(configs.changed(config, changes))
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _scored_by(config: EvaluatedConfig, rewards: object, key: str) -> tuple[str, ...]:
    """The names of the set's own functions. UserError for one that isn't among the run's."""
    if not rewards:
        return ()
    if not isinstance(config, PolicyGradientConfig):
        raise UserError(f"{key}.{REWARDS}: algo.name={config.algo.name} scores nothing: leave it out")
    names = [reward_name(function) for function in config.reward.functions]
    if not isinstance(rewards, list) or not all(isinstance(name, str) for name in rewards):
        raise UserError(f"{key}.{REWARDS} must be a list of functions' names, got {rewards!r}")
    for name in rewards:
        if name not in names:
            raise UserError(f"{key}.{REWARDS}: {unknown('reward', name, names)} (reward.functions names them all)")
    return tuple(rewards)


def _part(rows: Rows, config: EvaluatedConfig, *, held_out: bool) -> Rows:
    """The rows that eval.share holds out, or all others: a pure function of the seed and of their prompts.

    Rows of one prompt stay together, or the evaluation would ask what was trained on.
    """
    keys = np.array([stable_seed(config.seed, "held_out", _key(row, config.data)) for row in rows.rows], np.int64)
    number = round(config.eval.share * len(keys))
    limit = np.partition(keys, number - 1)[number - 1] if number else -1
    chosen = np.flatnonzero(keys <= limit) if held_out else np.flatnonzero(keys > limit)
    if not len(chosen):
        what = "to evaluate on" if held_out else "to train on"
        raise UserError(f"{rows.source}: eval.share={config.eval.share:g} of its {len(keys)} rows leaves none {what}")
    return rows.part(chosen)


def _key(row: Row, data: DataConfig) -> str:
    """What a row asks: its prompt, else all of it."""
    return json.dumps(row.get(data.prompt_column, row), default=str, sort_keys=True)
