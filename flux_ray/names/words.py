"""Values as Hydra's command line reads them.

Gives:  `hydra_value`, a value as text; `as_hydra_reads`, what a user has typed.
Knows:  what Hydra's grammar can't read is YAML's list or mapping, or a text. Hydra's own parser is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import yaml

from flux_ray.errors import UserError

#: What Hydra reads as a text without quotes (a tilde isn't, nor are letters beyond ASCII).
PLAIN = re.compile(r"[\w./:$%@?|*+-]+", re.ASCII)

#: What Hydra reads as a mapping's key. YAML takes {path:/a} for a key alone.
KEY = re.compile(r"[\w.-]+", re.ASCII)


def hydra_value(value: object) -> str:
    """The text after `option=`.

    >>> hydra_value([1, "a b"]), hydra_value({"min": 1, "on": True}), hydra_value(None), hydra_value("it's")
    ("[1,'a b']", '{min:1,on:true}', 'null', "'it\\\\'s'")
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{hydra_value(key)}:{hydra_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(hydra_value(item) for item in value)}]"
    text = str(value)
    if isinstance(value, str) and not (PLAIN.fullmatch(text) and _stays_text(text)):
        escaped = re.sub(r"(\\*)'", r"\1\1\\'", text)
        return "'" + re.sub(r"(\\+)$", r"\1\1", escaped) + "'"
    return text


def _stays_text(text: str) -> bool:
    """Whether Hydra doesn't take it for a number or a word of its own."""
    return not re.fullmatch(r"null|true|false|[+-]?(nan|inf)|[+-]?[\d._]+(e[+-]?\d+)?", text, re.IGNORECASE)


def as_hydra_reads(value: str, *, kind: str, key: str, several: bool, parse: Callable[[str], Any]) -> str:
    """What stands after `key=`, for Hydra: as it was typed, wherever Hydra reads it as this kind of option.

    kind: the option's type, e.g. "str | None", "list[str]", "Any". several: whether commas may part several values
    (--multirun). parse: Hydra's parser of an override; gives None for what isn't its grammar. UserError for a mapping
    that nobody can read.
    """
    if value == "None" and ("None" in kind or kind == "Any"):
        return "null"
    parsed = parse(f"{key}={value}")
    sweeps = parsed is not None and parsed.is_sweep_override()
    is_read = parsed is not None and (several or not sweeps)
    if kind in ("str", "str | None"):
        return value if is_read and (sweeps or _is_that_text(parsed.value(), value)) else hydra_value(value)
    if kind.startswith("list[") and value[:1] != "[" and not (several and sweeps):
        is_null = is_read and parsed.value() is None
        return value if is_null else as_hydra_reads(f"[{value}]", kind=kind, key=key, several=several, parse=parse)
    if is_read or not kind.startswith(("list[", "dict[", "Any")):
        return value
    return hydra_value(_of_yaml(key, value) if value[:1] in ("[", "{") else value)


def _is_that_text(value: object, text: str) -> bool:
    """Whether Hydra takes it for that text, a text in quotes, or null."""
    return value is None or text.strip()[:1] in ("'", '"') or value == text   # 007 and 1e5 are folders' names too


def _keys(value: object) -> Iterator[str]:
    """Of all mappings in it."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield str(key)
        yield from _keys(inner)


def _of_yaml(key: str, text: str) -> object:
    """The list or the mapping that stands in a text, else the text. UserError for a mapping that isn't YAML's."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if isinstance(found, (list, dict)) and all(map(KEY.fullmatch, _keys(found))):
        return found
    if text[:1] == "{" and text[-1:] == "}":
        raise UserError(f"{key}={text}: no mapping that can be read: put a blank after each colon, and texts with "
                        "other signs than letters, digits and / . _ - in quotes")
    return text
