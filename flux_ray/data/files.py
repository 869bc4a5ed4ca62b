"""The rows of one data file, whatever its format.

Takes:  a path: .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow, or by another name of these (each with .gz too).
Gives:  `read_file`: its rows one after another, as they are read; `format_of`: the ending that says how.
Knows:  what can be wrong with a file: UserError, or a Broken row, names file, line and column.
Never:  holds a file of lines in memory.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, cast

from flux_ray.data.rows import Broken, Row, first_line
from flux_ray.errors import UserError

MAX_CSV_FIELD_CHARS = 2**31 - 1  # the csv module's own limit (131,072) is less than a long prompt
MOST_SHOWN = 5  # names in a message

#: A reader: the path, the open file, the column of files that have none ► rows, None for a blank line.
Reader = Callable[[Path, IO[bytes], str], Iterator[Row | Broken | None]]


def format_of(path: Path) -> str | None:
    """The ending that says how to read the file, .gz aside; None where it isn't one of ours."""
    endings = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"]
    ending = ALSO.get(endings[-1], endings[-1]) if endings else None
    return ending if ending in READERS else None


def known_formats() -> str:
    return f"{', '.join(READERS)} (or with .gz)"


def read_file(path: Path, column: str) -> Iterator[Row | Broken | None]:
    """The file's rows; a line of a .txt file lies under `column`. UserError: it can't be read to its end."""
    ending = format_of(path)
    if ending is None:
        raise UserError(f"{path}: unknown kind of file; data files end in {known_formats()}")
    try:
        with path.open("rb") as raw:
            file = cast(IO[bytes], gzip.GzipFile(fileobj=raw)) if path.suffix.lower() == ".gz" else raw
            yield from READERS[ending](path, file, column)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _text(file: IO[bytes]) -> io.TextIOWrapper:
    return io.TextIOWrapper(file, encoding="utf-8-sig", newline="")


def _read_jsonl(path: Path, file: IO[bytes], _: str) -> Iterator[Row | Broken | None]:
    yield from _json_lines(path, _text(file))


def _json_lines(path: Path, lines: Iterable[str]) -> Iterator[Row | Broken | None]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            yield None
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield Broken(f"{path} line {number}: broken JSON: {error.msg} at column {error.colno}")
            continue
        except RecursionError:
            yield Broken(f"{path} line {number}: JSON that is nested too deeply")
            continue
        yield row if isinstance(row, dict) else Broken(f"{path} line {number}: {type(row).__name__}, not a JSON object")


def _read_json(path: Path, file: IO[bytes], _: str) -> Iterator[Row | Broken | None]:
    """A list of objects; or one object a line, which many call .json too."""
    text = _text(file).read()
    if not text.strip():
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and error.msg == "Extra data":
            yield from _json_lines(path, io.StringIO(text, newline=""))
            return
        raise UserError(f"{path} line {error.lineno}: broken JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list):
        lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
        found = f", whose rows may lie under {', '.join(map(repr, lists[:MOST_SHOWN]))}" if lists else ""
        raise UserError(f"{path}: {type(rows).__name__}{found}, not a JSON list of objects (one object a line: .jsonl)")
    for number, row in enumerate(rows, start=1):
        yield row if isinstance(row, dict) else Broken(
            f"{path} row {number} (from 1): {type(row).__name__}, not a JSON object")


def _read_csv(path: Path, file: IO[bytes], _: str, *, delimiter: str) -> Iterator[Row | Broken | None]:
    """Every cell stays text: an answer 007 must not become 7."""
    csv.field_size_limit(MAX_CSV_FIELD_CHARS)
    reader = csv.reader(_text(file), strict=True, delimiter=delimiter)
    try:
        header = next(reader, None)
        _check_header(path, header or [])
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


def _check_header(path: Path, names: list[str]) -> None:
    """UserError for names of which one would hide another's cells."""
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(f"{path}: the header names {twice[0]!r} twice")


def _read_txt(path: Path, file: IO[bytes], column: str) -> Iterator[Row | None]:
    """A prompt, or a text, a line."""
    for line in _text(file):
        text = line.rstrip("\r\n")
        yield {column: text} if text.strip() else None


def _read_parquet(path: Path, file: IO[bytes], _: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(file.read()))
        for batch in table.iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: broken Parquet: {first_line(error)}") from error


def _read_arrow(path: Path, file: IO[bytes], _: str) -> Iterator[Row]:
    """Arrow's stream, which the datasets library writes, or its file."""
    import pyarrow

    data = pyarrow.BufferReader(file.read())
    try:
        try:
            batches: Iterable[pyarrow.RecordBatch] = pyarrow.ipc.open_stream(data)
        except pyarrow.ArrowInvalid:
            data.seek(0)
            opened = pyarrow.ipc.open_file(data)
            batches = map(opened.get_batch, range(opened.num_record_batches))
        for batch in batches:
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: broken Arrow: {first_line(error)}") from error


READERS: dict[str, Reader] = {
    ".jsonl": _read_jsonl, ".json": _read_json, ".csv": partial(_read_csv, delimiter=","),
    ".tsv": partial(_read_csv, delimiter="\t"), ".txt": _read_txt, ".parquet": _read_parquet, ".arrow": _read_arrow,
}
#: Other endings of the same.
ALSO = {".ndjson": ".jsonl", ".jsonlines": ".jsonl", ".pq": ".parquet", ".feather": ".arrow"}
