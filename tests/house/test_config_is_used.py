"""One default, in config/: every option is read, every file of conf/ changes something."""

from __future__ import annotations

import ast
from functools import cache

import pytest
import yaml

from flux_ray import algo, config, names
from tests.house.source import REPO, modules

pytestmark = pytest.mark.unit

OPTIONS = dict(config.options())
FILES = sorted(path for path in (REPO / "conf").glob("*/*.yaml"))
#: Presets that are more than an entry of the algorithms' table.
OWN_OBJECTIVE = set(config.OBJECTIVES)


@cache
def reads() -> list[set[str]]:
    """The attributes that each module reads, config/ aside."""
    return [
        {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
        for name, _, tree in modules() if not name.startswith("flux_ray.config")
    ]


def test_every_option_is_read():
    """By its name; one whose name several sections have, in a module that reads its section too."""
    lasts = [key.rpartition(".")[2] for key in OPTIONS]
    unread = []
    for key in OPTIONS:
        section, _, last = key.rpartition(".")
        shared = lasts.count(last) > 1
        if not any(last in module and (not shared or section in module) for module in reads()):
            unread.append(key)
    assert unread == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_conf_holds_only_what_differs(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    values = yaml.safe_load(text) or {}
    chosen = [group["override /algo"] for group in values.pop("defaults", [])]
    flat = names.flatten(values, options=OPTIONS)
    algorithm = flat.pop("algo.name", *chosen or [config.DEFAULT_ALGORITHM])
    own = dict(config.options_of(config.objective_of(algorithm)))
    assert config.from_dict({"algo.name": algorithm, **flat})
    assert [key for key, value in flat.items() if value == config.default_of(own[key])] == []


def test_the_command_line_starts_with_the_default_algorithm():
    defaults = yaml.safe_load((REPO / "conf" / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    assert [entry["algo"] for entry in defaults if "algo" in entry] == [config.DEFAULT_ALGORITHM]


@pytest.mark.parametrize("name", config.READERS)
def test_the_sections_that_an_objective_does_not_have(name):
    lacks = {
        "sft": {"reward", "filter", "reference", "weights", "critic"},
        "reward_model": {"reward", "filter", "reference", "weights", "critic"},
        "dpo": {"reward", "filter", "weights", "critic"}, "ipo": {"reward", "filter", "weights", "critic"},
        "cdpo": {"reward", "filter", "weights", "critic"}, "ppo": set(),
    }.get(name, {"critic"})
    sections = {key.partition(".")[0] for key in OPTIONS}
    assert sections - {key.partition(".")[0] for key, _ in config.options_of(config.READERS[name])} == lacks


def test_presets_are_the_algorithms():
    presets = {path.stem for path in (REPO / "conf" / "algo").glob("*.yaml")}
    assert presets == set(algo.ALGORITHMS) | OWN_OBJECTIVE


def test_aliases_name_options():
    assert set(names.ALIASES.values()) <= set(OPTIONS)
    assert not set(names.ALIASES) & {key for key in OPTIONS if "." not in key}
