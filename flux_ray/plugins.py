"""Users' own Python files, in every process.

Takes:  the paths of `plugins`, and names of the form path/to/file.py:function.
Gives:  `load_plugins`, `load_function`: each file is imported once in a process; what it registers is then known there.
Never:  imports anything of the project's rooms: a plugin imports what it registers with.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from flux_ray.errors import UserError


def import_file(path: str, *, option: str) -> ModuleType:
    """The module of a Python file, imported once. UserError names the option, the file and what failed in it."""
    file = Path(path).expanduser().resolve()
    # The name is the same in every process, so that what the file defines can travel between them.
    name = f"flux_ray_user_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    if not file.is_file():
        raise UserError(f"{option}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{option}: {file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"{option}: importing {file} failed: {type(error).__name__}: {error}") from error
    return module


def load_plugins(paths: Iterable[str]) -> None:
    """Import each file of `plugins`."""
    for path in paths:
        import_file(path, option="plugins")


def load_function(name: str, *, option: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` names."""
    path, _, attribute = name.rpartition(":")
    module = import_file(path, option=f"{option}={name}")
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{option}={name}: {Path(path).expanduser().resolve()} has no function {attribute!r}")
    return function
