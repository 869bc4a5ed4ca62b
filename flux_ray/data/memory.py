"""Rows that a program holds, as a data file.

Takes:  a list of texts or of dicts, a dict of columns, a table of pandas, polars, Arrow or the datasets library.
Gives:  `is_named`: whether it is the name of data instead; `write_rows`: the rows as a .jsonl file.
Knows:  what looks like rows and isn't: a dict of splits, the names of files.
Never:  imports any of these libraries: it knows their tables by what they can do.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from flux_ray.data.files import format_of
from flux_ray.data.rows import Row
from flux_ray.errors import UserError

#: Attributes that tables have and columns don't: of Arrow and the datasets library, of polars, of pandas.
OF_TABLES = ("column_names", "to_dicts", "iterrows")
#: Methods that give a column's cells as a list: of numpy and pandas, of Arrow, of polars.
TO_LIST = ("tolist", "to_pylist", "to_list")


def is_named(prompts: object) -> bool:
    """Whether this names files or data sets, as `data.train` does, and holds no rows itself."""
    if isinstance(prompts, (str, Path)):
        return True
    if isinstance(prompts, Mapping):
        return bool(prompts) and (("path" in prompts and isinstance(prompts["path"], (str, Path)))
                                  or all(_names_a_set(value) for value in prompts.values()))
    return isinstance(prompts, (list, tuple)) and bool(prompts) and all(isinstance(item, Path) for item in prompts)


def _names_a_set(value: object) -> bool:
    return isinstance(value, (str, Path)) or (isinstance(value, Mapping) and "path" in value)


def as_named(prompts: object) -> object:
    """What `is_named` has found, as the config has it: plain texts, lists and dicts."""
    if isinstance(prompts, Path):
        return str(prompts)
    if isinstance(prompts, Mapping):
        return {name: as_named(value) for name, value in prompts.items()}
    return [as_named(item) for item in prompts] if isinstance(prompts, (list, tuple)) else prompts


def write_rows(prompts: object, file: Path, *, column: str, split: str, max_rows: int | None = None) -> None:
    """The rows as a .jsonl file; a text becomes a row with that text under `column`. UserError for what is none.

    max_rows: the first ones alone, as of a stream without an end.
    """
    number = 0
    with file.open("w", encoding="utf-8") as out:
        for number, item in enumerate(islice(_rows(prompts, split), max_rows), start=1):
            where = f"prompts, row {number - 1}"
            if not isinstance(item, (str, Mapping)):
                raise UserError(f"{where}: must be a text or a dict, not {type(item).__name__}")
            columns: Row = {column: item} if isinstance(item, str) else {str(key): item[key] for key in item}
            out.write(_line(columns, where))
    if not number:
        raise UserError("prompts: no rows in them")


def _line(columns: Row, where: str) -> str:
    try:
        return json.dumps(_plain(columns, where), ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}: rows hold texts, numbers, lists and dicts") from error


def _plain(value: object, where: str) -> object:
    """Numpy's numbers and arrays as Python's, dates and decimals as text; nan, by which tables say that a cell is
    empty, as None.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(one, where) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one, where) for one in value]
    if hasattr(value, "tolist") and not isinstance(value, (str, bytes)):
        return _plain(value.tolist(), where)
    if isinstance(value, float) and math.isnan(value):
        return None
    if type(value).__name__ in ("NAType", "NaTType"):
        return None
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


def _rows(prompts: Any, split: str) -> Iterable[object]:
    """The rows of whatever table this is. UserError for what isn't one."""
    if isinstance(prompts, Mapping):
        return _of_mapping(prompts, split)
    if hasattr(type(prompts), "iterrows"):
        return prompts.to_dict("records")
    for method in ("to_dicts", "to_pylist"):
        if hasattr(type(prompts), method):
            return getattr(prompts, method)()
    if isinstance(prompts, (list, tuple)) and prompts and all(_is_file(item) for item in prompts):
        raise UserError(f"prompts: {prompts[0]!r} is a file, but a list of texts is one of prompts: give "
                        "pathlib.Path objects to have files read")
    try:
        return iter(prompts)
    except TypeError as error:
        raise UserError(f"prompts: {type(prompts).__name__} holds no rows: give a list of texts or of dicts, a table, "
                        "or a file's name") from error


def _is_file(item: object) -> bool:
    return isinstance(item, str) and "\n" not in item and format_of(Path(item)) is not None and Path(item).is_file()


def _of_mapping(columns: Mapping[str, object], split: str) -> Iterable[object]:
    """Rows of a dict of columns, or of the one split that is meant."""
    names = list(columns)
    if any(hasattr(type(value), name) for value in columns.values() for name in OF_TABLES):
        if split not in names:
            raise UserError(f"prompts: {type(columns).__name__} of {', '.join(map(repr, names))} without {split!r} "
                            "(data.split, eval.split): give one of them")
        return _rows(columns[split], split)
    cells = [_cells(name, columns[name]) for name in names]
    if len(set(map(len, cells))) > 1:
        raise UserError("prompts: columns of different lengths: "
                        f"{', '.join(f'{name}: {len(column)}' for name, column in zip(names, cells, strict=True))}")
    return (dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True))


def _cells(name: str, column: object) -> list[object]:
    to_list = next((getattr(column, method) for method in TO_LIST if hasattr(column, method)), None)
    cells = to_list() if to_list is not None else column
    if not isinstance(cells, (list, tuple)):
        raise UserError(f"prompts: a dict holds columns, each a list, but {name!r} is {type(column).__name__}: "
                        "give a list of dicts for rows")
    return list(cells)
