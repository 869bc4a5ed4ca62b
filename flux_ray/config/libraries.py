"""The options of other libraries that are handed on as they are, read from those libraries' source.

Gives:  `trees` of a package's files, `fields` of its classes; `refuse_unknown`, with the nearest right name.
Never:  imports the library: that takes seconds, prints on the terminal and looks for a device.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Collection, Iterable
from pathlib import Path

from flux_ray.errors import UserError


@functools.cache
def trees(package: str, *patterns: str) -> tuple[ast.Module, ...]:
    """The parsed files of a package; none where it isn't installed."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        return ()
    files = [file for pattern in patterns for file in sorted(Path(found.origin).parent.glob(pattern))]
    return tuple(ast.parse(file.read_text(encoding="utf-8")) for file in files)


def fields(modules: Iterable[ast.Module], *classes: str) -> frozenset[str]:
    """The annotated names of these classes (none named: of all)."""
    bodies = [node.body for tree in modules for node in ast.walk(tree)
              if isinstance(node, ast.ClassDef) and (not classes or node.name in classes)]
    return frozenset(field.target.id for body in bodies for field in body
                     if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name))


def refuse_unknown(
    given: Iterable[str], known: Collection[str], *, option: str, library: str, not_offered: Collection[str] = (),
) -> None:
    """UserError for a key below `option` that the library doesn't have. None is known where it isn't installed.

    `not_offered`: known ones that have an option of ours.
    """
    for key in given if known else ():
        if key not in known:
            near = difflib.get_close_matches(key, sorted(set(known) - set(not_offered)), n=1)
            hint = f": did you mean '{option}.{near[0]}'?" if near else f": {library} has no such option"
            raise UserError(f"unknown option '{option}.{key}'{hint}")
