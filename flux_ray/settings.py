"""Options that are given outside of a program: in a YAML file, in the environment.

Gives:  `from_file`, `from_environment`: option ► value.
Knows:  FLUX_SECTION_OPTION, e.g. FLUX_TRAIN_LEARNING_RATE; the order is Python or the command line, environment, file.
Never:  passes over a variable of one of our sections that names no option.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from flux_ray import names
from flux_ray.config import open_options, options
from flux_ray.errors import UserError, unknown

PREFIX = "FLUX_"


def from_file(file: str | Path) -> dict[str, object]:
    """Options by their dotted names. UserError, with the file, for what can't be read or is no option."""
    path = Path(file).expanduser()
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: a mapping of options is wanted, not {type(tree).__name__}")
    tree = {str(name): value for name, value in tree.items()}
    if "defaults" in tree:
        raise UserError(f"{path}: has a list of defaults, so it is one of Hydra's: put it into DIR/experiment/, and "
                        f"name it by --config-dir DIR experiment={path.stem}")
    try:
        return names.flatten(tree, options=[key for key, _ in options()])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def from_environment() -> dict[str, object]:
    """The options that FLUX_SECTION_OPTION variables set. UserError for one of our sections that names no option."""
    by_variable = {PREFIX + key.upper().replace(".", "_"): key for key, _ in options()}
    sections = tuple({f"{PREFIX}{key.partition('.')[0].upper()}_" for key, _ in options() if "." in key})
    found: dict[str, object] = {}
    for variable, text in sorted(os.environ.items()):
        if variable in by_variable:
            key = by_variable[variable]
            found[key] = yaml.safe_load(text) if key in open_options() or text[:1] in "[{" else text
        elif variable.startswith(sections):
            raise UserError(str(unknown("variable", variable, by_variable)))
    return found
