"""An option: its default, what it means, what may be chosen.

Gives:  `knob` and `group` for the fields of sections, `retuned` (another section's knob with another default);
        `options` of a config class; `check_value`.
Knows:  what one value may be by itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import field
from typing import Any

from flux_ray.errors import UserError


def knob(default: object, meaning: str, *, choices: tuple[str, ...] = (), **bounds: float) -> Any:
    """A section's field: default, meaning (units included), what may be chosen, bounds (least, above, most)."""
    metadata = {"help": meaning, "choices": choices, "bounds": bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def group(cls: type) -> Any:
    """A config's field that is a section."""
    return field(default_factory=cls)


def retuned(cls: type, name: str, default: object) -> Any:
    """The knob `name` of the section `cls` with another default."""
    (same,) = (f for f in dataclasses.fields(cls) if f.name == name)
    return field(default=default, metadata=same.metadata)


def section_of(f: dataclasses.Field) -> type | None:
    """The section's class, where the field is a section."""
    default = f.default_factory if f.default_factory is not dataclasses.MISSING else None
    return default if isinstance(default, type) and dataclasses.is_dataclass(default) else None


def default_of(f: dataclasses.Field) -> Any:
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default


def options_of(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Every option of a config class as (dotted key, field)."""
    for f in dataclasses.fields(cls):
        section = section_of(f)
        if section is not None:
            yield from options_of(section, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f


def value_of(config: object, key: str) -> Any:
    """The value of an option by its dotted key."""
    for name in key.split("."):
        config = getattr(config, name)
    return config


def check_value(key: str, value: Any, f: dataclasses.Field) -> None:
    """UserError for a value that is no choice or out of bounds."""
    if value is None:
        return
    choices, bounds = f.metadata["choices"], f.metadata["bounds"]
    if value == "None" and default_of(f) is None:
        raise UserError(f"{key}=None is the word None: nothing is written null")
    if choices and value not in choices:
        raise UserError(f"{key} must be one of {', '.join(choices)}; got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key} must be a finite number, got {value}")
    if "least" in bounds and value < bounds["least"]:
        raise UserError(f"{key} must be >= {bounds['least']}, got {value}")
    if "above" in bounds and value <= bounds["above"]:
        raise UserError(f"{key} must be > {bounds['above']}, got {value}")
    if "most" in bounds and value > bounds["most"]:
        raise UserError(f"{key} must be <= {bounds['most']}, got {value}")
