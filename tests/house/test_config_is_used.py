"""One default, in config.py: every option is read, every file of conf/ changes something."""

from __future__ import annotations

import ast

import pytest
import yaml

from flux_ray import algo, config, names
from tests.house.source import REPO, modules

pytestmark = pytest.mark.unit

OPTIONS = dict(config.options())
FILES = sorted(path for path in (REPO / "conf").glob("*/*.yaml"))
#: Presets that are more than an entry of the algorithms' table.
OWN_OBJECTIVE = {"sft"}


def reads() -> set[str]:
    """Every attribute chain's last two names, e.g. `rollout.group_size`, and last name, outside config.py."""
    found = set()
    for name, _, tree in modules():
        if name == "flux_ray.config":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                found.add(node.attr)
                found.add(".".join(ast.unparse(node).split(".")[-2:]))
    return found


def test_every_option_is_read():
    """By its name; an option whose name several rooms have, as room.name."""
    seen, unread = reads(), []
    lasts = [key.rpartition(".")[2] for key in OPTIONS]
    for key in OPTIONS:
        last = key.rpartition(".")[2]
        room_read = key in seen or any(read.endswith(f"_config.{last}") or read in (f"config.{last}", f"self.{last}")
                                       for read in seen)
        if not (last in seen if lasts.count(last) == 1 else room_read):
            unread.append(key)
    assert unread == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_conf_holds_only_what_differs(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# @package _global_\n")
    values = yaml.safe_load(text) or {}
    values.pop("defaults", None)
    flat = names.flatten(values, options=OPTIONS)
    assert config.from_dict(flat)
    assert [key for key, value in flat.items() if value == config.default_of(OPTIONS[key])] == []


def test_presets_are_the_algorithms():
    presets = {path.stem for path in (REPO / "conf" / "algo").glob("*.yaml")}
    assert presets == set(algo.ALGORITHMS) | OWN_OBJECTIVE


def test_aliases_name_options():
    assert set(names.ALIASES.values()) <= set(OPTIONS)
    assert not set(names.ALIASES) & {key for key in OPTIONS if "." not in key}
