"""Rows of a source, kept compactly, and what a bad one does.

Takes:  the rows of a reader (files.py), one at a time.
Gives:  Rows: the source's name, its columns, and a Table of plain dicts that all have every column (None where a row
        had none); BadCell and BadRows, for whoever reads a row's cells.
Knows:  a column's name may be a path into a nested column: `reward_model.ground_truth`.
Never:  looks into a column: what a prompt or a completion must be is said by prompts.py and sft.py.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flux_ray.errors import UserError, unknown

log = logging.getLogger(__name__)

Row = dict[str, object]


@dataclass(frozen=True)
class Broken:
    """A line of a file that is no row: why, with its place."""

    why: str


@dataclass(frozen=True)
class FileBegins:
    """Between the rows of several files: those that follow are of this one."""

    name: str


class Table:
    """Rows as tuples under one set of names: a dict for each would take several times the memory.

    derived: columns that are made from a row whenever it is asked for.
    """

    def __init__(self, columns: tuple[str, ...], cells: list[tuple[object, ...]],
                 derived: dict[str, Callable[[Row], object]] | None = None) -> None:
        self._columns, self._cells, self._derived = columns, cells, derived or {}

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, number: int) -> Row:
        cells = self._cells[number]
        row: Row = dict(zip(self._columns, cells, strict=False))  # a row that came before a column lacks its cell
        for name in self._columns[len(cells):]:
            row[name] = None
        for name, make in self._derived.items():
            row[name] = make(row)
        return row

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def having(self, derived: dict[str, Callable[[Row], object]]) -> Table:
        """The same rows with further columns."""
        return Table(self._columns, self._cells, {**self._derived, **derived})

    def part(self, chosen: Sequence[int]) -> Table:
        """These rows alone, in this order."""
        return Table(self._columns, [self._cells[number] for number in chosen], self._derived)


@dataclass(frozen=True)
class Rows:
    """The rows of one source; `numbers[i]` is the place of `rows[i]` in it, from 1 and with blank lines counted.

    files: of a source of several, each one's name and the rows before it.

    >>> Rows.from_dicts("train.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "hi"}]).rows[1]
    {'prompt': 'hi', 'answer': None}
    """

    source: str
    columns: tuple[str, ...]
    rows: Table
    numbers: np.ndarray  # (rows,) int64
    num_broken: int = 0  # lines that are no row at all, left out (data.on_bad_row=skip)
    files: tuple[tuple[int, str], ...] = ()

    @classmethod
    def from_dicts(
        cls, source: str, dicts: Iterable[Row | Broken | FileBegins | None], *, on_bad_row: str = "skip"
    ) -> Rows:
        """Rows with one set of columns; broken ones counted and logged, or (stop) a UserError. None: a blank line.

        UserError where there is no row at all.
        """
        columns: dict[str, int] = {}
        cells: list[tuple[object, ...]] = []
        numbers = array("q")
        broken: list[Broken] = []
        files: list[tuple[int, str]] = []
        number = 0
        for row in dicts:
            if isinstance(row, FileBegins):
                files.append((number, row.name))
                continue
            number += 1
            if isinstance(row, Broken):
                broken.append(row)
                if on_bad_row == "stop":
                    raise UserError(f"{row.why} (data.on_bad_row=skip leaves such rows out)")
            elif row is not None:
                for name in row:
                    columns.setdefault(name, len(columns))
                cells.append(tuple(map(row.get, columns)))
                numbers.append(number)
        if not cells:
            raise UserError(f"every row is bad; the first: {broken[0].why}" if broken else f"{source}: no rows in it")
        if broken:
            log.warning("%s: %d broken rows left out; the first: %s", source, len(broken), broken[0].why)
        names = tuple(columns)
        return cls(source, names, Table(names, cells), np.array(numbers, np.int64), len(broken), tuple(files))

    def where(self, row: int) -> str:
        """File and place of row `row` (from 0), for a message."""
        number = int(self.numbers[row])
        before, name = max([one for one in self.files if one[0] < number], default=(0, self.source))
        return f"{name} row {number - before} (from 1)"

    def require(self, column: str, key: str) -> None:
        """UserError where `column`, which config field `key` names, isn't there."""
        if column not in self.columns:
            nested = nested_names(self.rows[0]) if "." in column else []
            raise UserError(f"{self.source}: {unknown('column', column, [*self.columns, *nested])} ({key} names it)")

    def having(self, **derived: Callable[[Row], object]) -> Rows:
        """With further columns, each made from the row."""
        names = tuple(dict.fromkeys([*self.columns, *derived]))
        return replace(self, columns=names, rows=self.rows.having(derived))

    def part(self, chosen: np.ndarray) -> Rows:
        """These rows alone, in this order."""
        return replace(self, rows=self.rows.part(chosen.tolist()), numbers=self.numbers[chosen])

    def reaching(self, column: str) -> Rows:
        """With a column of that name where it is a path (`reward_model.truth`) that leads to a value in some row.

        A column that has dots in its own name stays what it is.
        """
        if column in self.columns or column.partition(".")[0] not in self.columns:
            return self
        if all(inside(row, column) is None for row in self.rows):
            return self
        return self.having(**{column: lambda row: inside(row, column)})


def inside(row: Row, path: str) -> object:
    """The value at a path through nested mappings and lists; None where there is none.

    >>> inside({"reward_model": {"truth": ["4", "four"]}}, "reward_model.truth.1")
    'four'
    """
    value: object = row
    for name in path.split("."):
        if isinstance(value, dict):
            value = value.get(name)
        elif isinstance(value, list) and name.isdecimal():
            value = value[int(name)] if int(name) < len(value) else None
        else:
            return None
    return value


def nested_names(row: Row, prefix: str = "") -> list[str]:
    """The paths to all that a row's nested mappings hold.

    >>> nested_names({"a": 1, "b": {"c": {"d": 2}}})
    ['b.c', 'b.c.d']
    """
    names = []
    for name, value in row.items():
        names += [prefix + name] if prefix else []
        names += nested_names(value, f"{prefix}{name}.") if isinstance(value, dict) else []
    return names


class BadCell(Exception):
    """One cell is bad. `column`: where it isn't the one being read. `BadRows` adds the file and the row."""

    def __init__(self, why: str, column: str | None = None) -> None:
        super().__init__(why)
        self.column = column


class BadRows:
    """What a bad row does: it stops the run (data.on_bad_row=stop), or is left out, counted and logged (skip)."""

    def __init__(self, rows: Rows, column: str, on_bad_row: str) -> None:
        self._rows = rows
        self._column = column
        self._skip = on_bad_row == "skip"
        self._bad: set[int] = set()
        self._first = len(rows.rows), ""

    def add(self, row: int, bad: BadCell) -> None:
        """Row `row` (from 0) is bad. UserError unless bad rows are skipped."""
        message = f"{self._rows.where(row)}: column {(bad.column or self._column)!r}: {bad}"
        if not self._skip:
            raise UserError(f"{message} (data.on_bad_row=skip leaves such rows out)")
        self._bad.add(row)
        self._first = min(self._first, (row, message))

    def report(self) -> int:
        """How many rows were left out, logged with the first of them. UserError where none is left."""
        if not self._bad:
            return 0
        if len(self._bad) == len(self._rows.rows):
            raise UserError(f"every row is bad; the first: {self._first[1]}")
        log.warning("%d of %d rows left out; the first: %s", len(self._bad), len(self._rows.rows), self._first[1])
        return len(self._bad)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
