"""From plain values to the config of an objective.

Takes:  Hydra's overrides, a YAML file, a Python dict.
Gives:  `from_dict`, `to_dict`, `changed`; `options`, every option of any objective; `schema`, for Hydra; `given`, what
        Hydra was given; `preset`, of an algorithm.
Knows:  the objective is chosen by algo.name; an option that it doesn't have is refused by naming who reads it.
Never:  checks a value against another; touches a file, presets aside.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import MISSING, Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flux_ray import names
from flux_ray.config.knobs import default_of, options_of, section_of
from flux_ray.config.objectives import (
    DEFAULT_ALGORITHM,
    OBJECTIVES,
    PROMPTS,
    C,
    Config,
    PolicyGradientConfig,
    objective_of,
)
from flux_ray.errors import UserError

#: Presets and experiments: the repository's conf/, which the wheel holds as flux_ray/conf.
CONF = Path(__file__).parents[1] / "conf"

NAME = "algo.name"
POLICY_GRADIENT = "grpo and its kin"  # in messages and help: the algorithms of policy gradient without a critic
#: Who reads an option ► the class that says which.
READERS: dict[str, type[Config]] = {POLICY_GRADIENT: PolicyGradientConfig, **OBJECTIVES}


def options() -> Iterator[tuple[str, dataclasses.Field]]:
    """Every option of any objective as (dotted key, field), section by section."""
    yield from _options()


@functools.cache
def _options() -> tuple[tuple[str, dataclasses.Field], ...]:
    every = [option for cls in READERS.values() for option in options_of(cls)]
    sections = list(dict.fromkeys(key.rpartition(".")[0] for key, _ in every))
    once = {key: f for key, f in reversed(every)}
    first = dict.fromkeys(key for key, _ in every)
    return tuple((key, once[key]) for key in sorted(first, key=lambda key: sections.index(key.rpartition(".")[0])))


def readers(option: str) -> dict[str, dataclasses.Field]:
    """Who reads an option ► its field there, whose default and meaning may be others than elsewhere."""
    found = {name: dict(options_of(cls)).get(option) for name, cls in READERS.items()}
    return {name: f for name, f in found.items() if f is not None}


def open_options() -> list[str]:
    """The options that are mappings: any key may be set below them."""
    return [key for key, f in options() if isinstance(default_of(f), dict)]


def to_dict(config: Config) -> dict[str, Any]:
    return dataclasses.asdict(config)


def to_yaml(config: Config) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def as_written(tree: Container) -> Any:
    """A tree of OmegaConf's as plain values, with interpolations as they stand there."""
    return OmegaConf.to_container(tree, resolve=False)


def changed(config: C, values: Mapping[str, object]) -> C:
    """The config with other values of some of its options, by their dotted keys."""
    for key, value in values.items():
        config = _replaced(config, key.split("."), value)
    return config


def _replaced(section: Any, names_: list[str], value: Any) -> Any:
    first, *rest = names_
    new = _replaced(getattr(section, first), rest, value) if rest else value
    return dataclasses.replace(section, **{first: new})


def schema() -> DictConfig:
    """Every option of any objective as a typed OmegaConf tree to merge into, none of them given."""
    return _opened(OmegaConf.structured(_union(list(READERS.values()))))


def _union(classes: list[type]) -> type:
    """A class with the fields of all these, sections within it too. Mappings are empty, all other options missing."""
    fields: dict[str, tuple[str, type, object]] = {}
    of_sections: dict[str, list[type]] = {}
    for cls in classes:
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            section = section_of(f)
            if section is not None:
                of_sections.setdefault(f.name, []).append(section)
            missing = dataclasses.field(default_factory=dict) if isinstance(default_of(f), dict) else MISSING
            fields[f.name] = f.name, types[f.name], missing
    for name, sections in of_sections.items():
        union = _union(sections)
        fields[name] = name, union, dataclasses.field(default_factory=union)
    return dataclasses.make_dataclass("Options", fields.values())


def _opened(tree: DictConfig) -> DictConfig:
    """Values may be set (frozen dataclasses make read-only nodes), and any key below an option that is a mapping."""
    for name in ("", *sorted({section for key, _ in options() for section in names.sections_of(key)})):
        if OmegaConf.select(tree, name) is not None or not name:
            OmegaConf.set_readonly(OmegaConf.select(tree, name) if name else tree, False)
    for key in open_options():
        if OmegaConf.select(tree, key) is not None:
            OmegaConf.set_struct(OmegaConf.select(tree, key), False)
    return tree


def given(tree: DictConfig) -> dict[str, Any]:
    """What a tree of the schema was given: option ► its value as it was written, interpolations among them."""
    flat = names.flatten(as_written(tree), options=[key for key, _ in options()])
    return {key: value for key, value in flat.items() if value not in (MISSING, {})}


def from_dict(values: Mapping[str, object], *, before: Mapping[str, object] | None = None) -> Config:
    """Config from plain values: nested, dotted or by the names people bring; what is absent keeps its default.

    >>> from_dict({"algorithm": "grpo", "algo": {"epsilon": 0.3}, "rollout.group_size": 8}).algo.clip_range
    0.3

    `before`: as an earlier run had saved its options; of those that the objective doesn't have, none was read.
    Raises UserError: unknown keys (with the nearest right one), options that the objective doesn't have, wrong types,
    two names of one option that disagree.
    """
    keys = [key for key, _ in options()]
    flat, saved = names.flatten(values, options=keys), names.flatten(before or {}, options=keys)
    name = str(flat.get(NAME, saved.get(NAME, DEFAULT_ALGORITHM)))
    cls = objective_of(name)
    own = dict(options_of(cls))
    for key, value in flat.items():
        if _option(key, keys) not in own:
            raise UserError(_unread(key, value, name))
    kept = {key: value for key, value in saved.items() if _option(key, keys) in own}
    tree = copy.deepcopy(_empty(cls))  # type: ignore[arg-type]  # mypy looks for the hash of an instance
    try:
        for key, value in {**kept, **flat}.items():
            OmegaConf.update(tree, key, value, merge=False, force_add=key not in keys)
        config = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        raise names.explain(error, options=keys) or error from error
    assert isinstance(config, Config)
    return config


@functools.cache
def _empty(cls: type[Config]) -> DictConfig:
    """The options of an objective as a tree to copy: to make it of the dataclasses takes six times as long."""
    return _opened(OmegaConf.structured(cls))


def _option(key: str, keys: list[str]) -> str:
    """The option that a key is, or lies in."""
    return key if key in keys else next(option for option in keys if key.startswith(f"{option}."))


def _unread(key: str, value: object, name: str) -> str:
    """Why this algorithm doesn't take that option."""
    cls, who = objective_of(name), list(readers(_option(key, [key for key, _ in options()])))
    samples = cls.learns_from == PROMPTS or any(READERS[one].learns_from != PROMPTS for one in who)
    why = "" if samples else f", which learns from {cls.learns_from} and rolls nothing out"
    instead = f", or choose algo={who[0]}" if len(who) == 1 and who[0] in OBJECTIVES else ""
    return f"{key}={value} is read by {', '.join(who)} alone, not by {name}{why}: leave it out{instead}"


def preset(algorithm: str) -> dict[str, Any]:
    """What conf/algo/NAME.yaml sets, for the Python API, which composes nothing; empty for a user's own algorithm."""
    name = names.ALGORITHM_ALIASES.get(algorithm, algorithm)
    file = CONF / "algo" / f"{name}.yaml"
    values = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else None
    return values or {}   # type: ignore[return-value]  # the same
