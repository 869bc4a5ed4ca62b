"""Rows of a data file, whatever its format.

Takes:  a path (.jsonl, .json, .csv, .parquet, each also with .gz), a hub data set's name, or rows in memory.
Gives:  Rows: the source's name, its columns, and plain dicts that all have every column (None where a row had none).
Knows:  what can be wrong with a file: UserError names file, line and column; what a bad row does (BadRows).
Never:  looks into a column: what a prompt or a completion must be is said by prompts.py and sft.py.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from flux_ray.errors import UserError, unknown

log = logging.getLogger(__name__)

Row = dict[str, Any]

MAX_CSV_FIELD_CHARS = 2**31 - 1  # the csv module's own limit (131,072) is less than a long prompt


@dataclass(frozen=True)
class Broken:
    """A line of a file that is no row: why, with its place."""

    why: str


@dataclass(frozen=True)
class Rows:
    """The rows of one source; `numbers[i]` is the place of `rows[i]` in it, from 1 and with blank lines counted.

    >>> Rows.from_dicts("train.jsonl", [{"prompt": "1+1=", "answer": "2"}, {"prompt": "hi"}]).rows[1]
    {'prompt': 'hi', 'answer': None}
    """

    source: str
    columns: tuple[str, ...]
    rows: list[Row]
    numbers: tuple[int, ...]
    num_broken: int = 0  # lines that are no row at all, left out (data.on_bad_row=skip)

    @classmethod
    def from_dicts(cls, source: str, dicts: Sequence[Row | Broken | None]) -> Rows:
        """Rows with one set of columns; broken ones counted and logged (None: a blank line).

        UserError where there is no row at all.
        """
        broken = [row for row in dicts if isinstance(row, Broken)]
        numbers, whole = [], []
        for number, row in enumerate(dicts, start=1):
            if isinstance(row, dict):
                numbers.append(number)
                whole.append(row)
        if not whole:
            raise UserError(f"every row is bad; the first: {broken[0].why}" if broken else f"{source}: no rows in it")
        if broken:
            log.warning("%s: %d broken rows left out; the first: %s", source, len(broken), broken[0].why)
        columns = tuple(dict.fromkeys(name for row in whole for name in row))
        rows = [{name: row.get(name) for name in columns} for row in whole]
        return cls(source, columns, rows, tuple(numbers), len(broken))

    def require(self, column: str, key: str) -> None:
        """UserError where `column`, which config field `key` names, isn't there."""
        if column not in self.columns:
            raise UserError(f"{self.source}: {unknown('column', column, self.columns)} ({key} names it)")


class BadCell(Exception):
    """What is wrong with one cell (of `column`, where it isn't the one being read); `BadRows` knows file and row."""

    def __init__(self, why: str, column: str | None = None) -> None:
        super().__init__(why)
        self.column = column


class BadRows:
    """What a bad row does: it stops the run (data.on_bad_row=stop), or is left out, counted and logged (skip)."""

    def __init__(self, rows: Rows, column: str, on_bad_row: str) -> None:
        self._rows = rows
        self._column = column
        self._skip = on_bad_row == "skip"
        self._reasons: dict[int, str] = {}

    def add(self, row: int, bad: BadCell) -> None:
        """Row `row` (from 0) is bad. UserError unless bad rows are skipped."""
        where = f"{self._rows.source} row {self._rows.numbers[row]} (from 1): column {(bad.column or self._column)!r}"
        message = f"{where}: {bad}"
        if not self._skip:
            raise UserError(f"{message} (data.on_bad_row=skip leaves such rows out)")
        self._reasons[row] = message

    def report(self) -> int:
        """How many rows were left out, logged with the first of them. UserError where none is left."""
        if not self._reasons:
            return 0
        first = self._reasons[min(self._reasons)]
        if len(self._reasons) == len(self._rows.rows):
            raise UserError(f"every row is bad; the first: {first}")
        log.warning("%d of %d rows left out; the first: %s", len(self._reasons), len(self._rows.rows), first)
        return len(self._reasons)


def load_rows(
    source: str | Path | Sequence[Any],
    *,
    split: str,
    max_rows: int | None,
    column: str = "prompt",
    on_bad_row: str = "stop",
) -> Rows:
    """Rows of a file, of a hub data set (`name` or `name:subset`), or of a list of texts or dicts in memory.

    `split` is of use to hub data sets alone; a text in a list becomes a row with that text under `column`.
    UserError: nothing there, an unknown ending, no rows, an offline hub, and (unless on_bad_row is skip) a broken line.
    """
    if not isinstance(source, (str, Path)):
        return _rows_in_memory(list(islice(source, max_rows)), column)
    path = Path(source).expanduser()
    if path.is_file():
        rows = _read_file(path, max_rows)
        broken = next((row for row in rows if isinstance(row, Broken)), None)
        if broken is not None and on_bad_row != "skip":
            raise UserError(broken.why)
        return Rows.from_dicts(str(source), rows)
    if path.is_dir():
        raise UserError(f"{source}: a folder, not a data file; name one of: {', '.join(READERS)} (or with .gz)")
    if _format_of(path) is not None or str(source).startswith(("/", ".", "~")):
        raise UserError(f"{source}: no such file")
    return Rows.from_dicts(f"{source} [{split}]", _read_hub(str(source), split, max_rows))


def _rows_in_memory(items: list[Any], column: str) -> Rows:
    rows = [{column: item} if isinstance(item, str) else item for item in items]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"prompts in memory: item {number} (from 1) is {type(row).__name__}, not a text or a dict")
    return Rows.from_dicts("prompts in memory", rows)


def _format_of(path: Path) -> str | None:
    """The ending that says how to read the file, .gz aside; None where it isn't one of ours."""
    endings = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    return endings[-1] if endings and endings[-1] in READERS else None


def _read_file(path: Path, max_rows: int | None) -> list[Row | Broken | None]:
    ending = _format_of(path)
    if ending is None:
        raise UserError(f"{path}: unknown kind of file; data files end in {', '.join(READERS)} (or with .gz)")
    try:
        with path.open("rb") as raw:
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw
            return _first(READERS[ending](path, file), max_rows)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _first(rows: Iterator[Row | Broken | None], max_rows: int | None) -> list[Row | Broken | None]:
    """The first `max_rows` rows (none: all) and the blank lines among them."""
    taken: list[Row | Broken | None] = []
    num_rows = 0
    for row in rows:
        if num_rows == max_rows:
            break
        taken.append(row)
        num_rows += row is not None
    return taken


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path, file: IO[bytes]) -> Iterator[Row | Broken | None]:
    for number, line in enumerate(_text(file), start=1):
        if not line.strip():
            yield None
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield Broken(f"{path} line {number}: broken JSON: {error.msg} at column {error.colno}")
            continue
        yield row if isinstance(row, dict) else Broken(f"{path} line {number}: {type(row).__name__}, not a JSON object")


def _read_json(path: Path, file: IO[bytes]) -> Iterator[Row]:
    text = _text(file).read()
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {error.lineno}: broken JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: {type(rows).__name__}, not a JSON list of objects (one object a line: .jsonl)")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number} (from 1): {type(row).__name__}, not a JSON object")
        yield row


def _read_csv(path: Path, file: IO[bytes]) -> Iterator[Row | Broken | None]:
    """Every cell stays text: an answer 007 must not become 7."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARS)
    reader = csv.reader(_text(file), strict=True)
    try:
        header = next(reader, None)
        for number, cells in enumerate(reader, start=1):
            if not cells:
                yield None
                continue
            if header is None or len(cells) != len(header):
                expected = len(header or [])
                yield Broken(f"{path} row {number} (from 1): {len(cells)} cells, but the header has {expected}")
                continue
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: broken CSV: {error}") from error


def _read_parquet(path: Path, file: IO[bytes]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.read()))
        for batch in table.iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: broken Parquet: {first_line(error)}") from error


READERS = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _read_hub(name: str, split: str, max_rows: int | None) -> list[Row]:
    """Rows of a hub data set; `name:subset` picks one of its configurations."""
    repository, _, subset = name.partition(":")
    try:
        import datasets

        data = datasets.load_dataset(repository, subset or None, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds: whichever it is, the user named the data set
        subsets = f"; name one as {repository}:SUBSET: {subset_names(error)}" if subset_names(error) else ""
        raise UserError(
            f"{name}: neither a file here nor a data set that the hub gives for split {split!r}: "
            f"{type(error).__name__}: {first_line(error)}{subsets}"
        ) from error
    return [dict(row) for row in islice(data, max_rows)]


def subset_names(error: Exception) -> str:
    """The list of a data set's subsets, where the library asks for one of them."""
    found = re.search(r"available configs: (\[.*?\])", str(error))
    return found[1] if found else ""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
