"""Users' own Python files, in every process.

Takes:  the paths of `plugins`, and names of the form path/to/file.py:function or package.module:function.
Gives:  `load_plugins`, `load_function`: each file is imported once in a process; what it registers is then known there.
        `hand_over`: a name for a function that has no file.
        `same_function`: whether a registration is the same once more; `refuse_while_importing`.
Never:  imports anything of the project's own parts: a plugin imports what it registers with.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

from flux_ray.errors import UserError, unknown

#: The file that is being imported, if any.
_importing: ContextVar[Path | None] = ContextVar("importing", default=None)
_imported: dict[Path, ModuleType] = {}

#: Before the name of a function that was handed over as itself.
HANDED_OVER = "given:"
_handed_over: dict[str, Callable[..., object]] = {}


def import_file(path: str, *, option: str) -> ModuleType:
    """The module of a Python file, imported once. UserError names the option, the file, the line and what failed.

    It is imported by the name that a script beside it, or beside its package, would import it by, so that relative
    imports work and the processes that it starts find what it defines; by a made-up one where that is another module's.
    """
    file = Path(path).expanduser().resolve()
    if file in _imported:
        return _imported[file]
    if not file.is_file():
        raise UserError(f"{option}: there is no file {file}")
    if file.suffix != ".py":
        raise UserError(f"{option}: {file} is not a Python file")
    outer = _importing.set(file)
    try:
        module = _imported[file] = _import(file)
    except (Exception, SystemExit) as error:
        if isinstance(error, UserError):
            raise
        where = f"{file}{_line_in(file, error)}"
        raise UserError(f"{option}: importing {where} failed: {type(error).__name__}: {error}") from error
    finally:
        _importing.reset(outer)
    return module


def _import(file: Path) -> ModuleType:
    root, name = _place(file)
    for folder in (str(root), str(file.parent)):  # it may import the files beside it, as when it is run as a script
        if folder not in sys.path:
            sys.path.append(folder)
    importlib.invalidate_caches()
    if _found_by(name) == file:
        return importlib.import_module(name)
    name = f"flux_ray_user_{file.stem}_{hashlib.blake2b(str(file).encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None, file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _place(file: Path) -> tuple[Path, str]:
    """The folder from which the file's module is imported, and its dotted name there.

    Its package is every folder above it with an __init__.py, and as many as its relative imports go up.
    """
    up = 0
    with contextlib.suppress(SyntaxError, ValueError):  # it is told when the file is imported
        up = max((node.level for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.ImportFrom)),
                 default=0)
    names, root = [] if file.stem == "__init__" else [file.stem], file.parent
    while (len(names) <= up or (root / "__init__.py").is_file()) and root.name.isidentifier():
        names.append(root.name)
        root = root.parent
    return root, ".".join(reversed(names))


def _found_by(name: str) -> Path | None:
    """The file that a module of that name is, or would be, imported from."""
    module = sys.modules.get(name)
    try:
        spec = getattr(module, "__spec__", None) if module is not None else importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # its package's own
        return None
    except ValueError:  # a module that was made by hand
        return None
    origin = getattr(spec, "origin", None)
    return Path(origin).resolve() if origin else None


def refuse_while_importing() -> None:
    """UserError where a user's file trains as it is imported: within a run, and in each of its processes."""
    file = _importing.get()
    if file is not None:
        raise UserError(f"every process of a run imports {file}, which would train (or evaluate) again: put the calls "
                        "under `if __name__ == \"__main__\":`, or the functions into a file of their own")


def _line_in(file: Path, error: BaseException) -> str:
    """` line N`: where in the file the error came up; nothing where it didn't."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return f" line {error.lineno}"
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(file)]
    return f" line {lines[-1]}" if lines else ""


def load_plugins(paths: Iterable[str]) -> None:
    """Import each file of `plugins`."""
    for path in paths:
        import_file(path, option="plugins")


def same_function(one: Callable[..., object], other: Callable[..., object]) -> bool:
    """Whether both are one function of one file, by two imports: a script's, say, that is imported as a plugin too.

    A notebook's cell has no file: the function of that name is then the same one, and the newer counts.
    """
    codes = [getattr(inspect.unwrap(function), "__code__", None) for function in (one, other)]
    if None in codes:
        return False
    if one.__module__ == other.__module__:
        typed = all(code and not Path(code.co_filename).is_file() for code in codes)
        return typed and len({code.co_qualname for code in codes if code} - {"<lambda>"}) == 1
    return len({(str(Path(code.co_filename).resolve()), code.co_qualname) for code in codes if code}) == 1


def hand_over(function: Callable[..., object], *, name: str | None = None) -> str:
    """The name by which this process knows a function that none can import; `name`: what another process called it."""
    if name is None:
        own = "".join(filter(lambda c: c.isidentifier(), getattr(function, "__name__", type(function).__name__)))
        names = (f"{HANDED_OVER}{own or 'reward'}{f'_{number}' if number else ''}" for number in count())
        name = next(name for name in names if _handed_over.get(name, function) is function)
    _handed_over[name] = function
    return name


def is_handed_over(name: str) -> bool:
    """Whether it names a function that this process was given."""
    return name in _handed_over


def load_function(name: str, *, option: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:function` or `package.module:function` names. UserError: what is missing."""
    if name.startswith(HANDED_OVER):
        if name not in _handed_over:
            raise UserError(f"{option}: {name!r} was a function of the Python process that gave it: give it again, as "
                            "FluxTrainer(config, rewards=[...]) does, or put it at the top of a file")
        return _handed_over[name]
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError(f"{option}: {name!r} is not of the form path/to/file.py:function")
    module = import_file(place, option=option) if place.endswith(".py") else _import_module(place, option=option)
    function = getattr(module, attribute, None)
    if function is None:
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise UserError(f"{option}: {place}: {unknown('function', attribute, functions)}")
    if not callable(function):
        raise UserError(f"{option}: {name}: {attribute} is {type(function).__name__}, not a function")
    return function


def file_of_module(name: str) -> Path | None:
    """The file of `package.module` beneath the present folder, where `python -m` would find it; else None."""
    place = Path.cwd().joinpath(*name.split("."))
    return next((file for file in (place.with_name(f"{place.name}.py"), place / "__init__.py") if file.is_file()), None)


def _import_module(name: str, *, option: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"{option}: importing {name} failed: {type(error).__name__}: {error}") from error
