"""The table of a run's rollouts: search, filter, sort, a page at a time.

Takes:  a run's folder with rollouts/, or with samples.jsonl alone.
Gives:  `table_of`; of a table `page` and `group`.
Keeps:  an index of each rollout's numbers, some 80 bytes each; texts and tokens stay on disk until they are shown.
Knows:  a file of rollouts never changes: it comes whole, and may go. Each is read for the index once.
Never:  fails for a broken file, or one of other columns: `notes` say which it passed over.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from flux_ray.observability.page.runs import ROLLOUTS, Record, Run
from flux_ray.observability.run_folder import SAMPLES

#: What the index has of a rollout, beside its step. A table may be sorted by any of them.
INDEXED = pa.schema([
    ("uid", pa.int64()), ("attempt", pa.int32()), ("sample", pa.int32()), ("row", pa.int64()),
    ("data_set", pa.string()), ("outcome", pa.string()), ("reward", pa.float64()), ("task_reward", pa.float64()),
    ("advantage", pa.float64()), ("num_tokens", pa.int32()), ("num_turns", pa.int32()), ("truncated", pa.bool_()),
    ("generate_s", pa.float32()),
])
SHOWN = (*INDEXED.names, "prompt", "response", "parts")
WORDS = ("data_set", "outcome")
SORTABLE = ("step", *INDEXED.names)
FILES_AT_ONCE = 32
BUDGET_S = 0.5
MOST_SHOWN = 200  # letters of a prompt or a response in the table
MOST_SEARCHES = 4  # whose hits are kept
STEP = re.compile(r"step=(\d+)")


@dataclass(frozen=True)
class Wanted:
    """Which rollouts, in which order. None: any."""

    search: str = ""
    first_step: int | None = None
    last_step: int | None = None
    least_reward: float | None = None
    most_reward: float | None = None
    uid: int | None = None
    data_set: str | None = None
    outcome: str | None = None
    truncated: bool | None = None
    sort: str = "step"
    descending: bool = True


class Source(Protocol):
    """Where a table's rows come from."""

    notes: list[str]
    unread: int  # files that the index doesn't know yet

    def read_new(self, budget_s: float) -> pa.Table | None:
        """The whole index, where it isn't as it was. After about `budget_s` the rest is left `unread`."""

    def hits(self, text: str, rows: np.ndarray, index: pa.Table) -> np.ndarray:
        """Those of these rows, by number, whose prompt or response has the text, in whatever case."""

    def read(self, rows: np.ndarray, index: pa.Table, columns: Sequence[str]) -> list[Record]:
        """These rows with these columns."""

    def group(self, step: int, uid: int, attempt: int) -> list[Record]:
        """All that is known of each sample of a group."""


class Table:
    """Of one run. Its methods are called from any thread, one at a time."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._index = _empty()
        self._searched: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # text ► which rows were looked at; which have it

    def page(self, wanted: Wanted, *, first: int, size: int, budget_s: float = BUDGET_S) -> Record:
        """`total` rows are wanted, of `known`; `rows` are those from `first` on; `outcomes` and `data_sets` there are.

        After about `budget_s` of reading, newest first, it answers with what is known, and says how many files are
        `unread`: the next look goes on.
        """
        with self._lock:
            self._refresh(budget_s)
            rows = self._wanted(wanted)
            shown = self._source.read(rows[first:first + size], self._index, SHOWN)
            return {"total": len(rows), "known": len(self._index), "first": first, "notes": self._source.notes,
                    "unread": self._source.unread, "rows": [_short(row) for row in shown],
                    **{f"{name}s": _choices(self._index[name]) for name in WORDS}}

    def group(self, step: int, uid: int, attempt: int) -> list[Record]:
        """All that is known of each sample of a group, in their order; empty where there is no such group."""
        return sorted(self._source.group(step, uid, attempt), key=lambda row: row.get("sample") or 0)

    def columns(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Columns of the whole index, (rows,) each: all files are read."""
        with self._lock:
            self._refresh(math.inf)
            return {name: _numbers(self._index[name]) for name in names}

    def read(self, rows: np.ndarray, columns: Sequence[str]) -> list[Record]:
        """Rows by their numbers in `columns`."""
        with self._lock:
            return self._source.read(rows, self._index, columns)

    def _refresh(self, budget_s: float) -> None:
        found = self._source.read_new(budget_s)
        if found is not None:
            self._index, self._searched = found, {}

    def _wanted(self, wanted: Wanted) -> np.ndarray:
        index, mask = self._index, np.ones(len(self._index), dtype=bool)
        bounds = (("step", wanted.first_step, wanted.last_step), ("reward", wanted.least_reward, wanted.most_reward),
                  ("uid", wanted.uid, wanted.uid))
        for name, least, most in bounds:
            mask &= True if least is None else _numbers(index[name]) >= least
            mask &= True if most is None else _numbers(index[name]) <= most
        for name in (*WORDS, "truncated"):
            value = getattr(wanted, name)
            if value is not None:
                mask &= _truth(pc.equal(index[name], value))
        rows = np.flatnonzero(mask)
        if wanted.search:
            rows = self._hits(wanted.search.casefold(), rows)
        return _sorted(index, rows, wanted.sort, descending=wanted.descending)

    def _hits(self, text: str, rows: np.ndarray) -> np.ndarray:
        """A row is looked at once, and whether it has the text is kept."""
        nothing = np.zeros(len(self._index), dtype=bool)
        looked, have = self._searched.setdefault(text, (nothing, nothing.copy()))
        have[self._source.hits(text, rows[~looked[rows]], self._index)] = True
        looked[rows] = True
        while len(self._searched) > MOST_SEARCHES:
            del self._searched[next(iter(self._searched))]
        return rows[have[rows]]


class Parquet:
    """rollouts/step=N/*.parquet; `file` and `offset` of the index say where a row's texts are."""

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self.unread = 0
        self._folder = folder
        self._whole_s = 0.0  # to put the index together last: of a large one more is read before it is done again
        self._files: list[Path] = []  # by `file` of the index
        self._known: dict[Path, pa.Table] = {}
        self._broken: dict[Path, str] = {}

    def read_new(self, budget_s: float) -> pa.Table | None:
        there = sorted(self._folder.glob("step=*/[!.]*.parquet"))
        seen = self._known.keys() | self._broken.keys()
        new = [file for file in reversed(there) if file not in seen]
        self.unread = len(new)
        if not new and len(there) == len(seen):
            return None
        end = time.monotonic() + max(budget_s, 3 * self._whole_s)
        for begin in range(0, len(new), FILES_AT_ONCE):
            self._read(new[begin:begin + FILES_AT_ONCE])
            self.unread = max(0, len(new) - begin - FILES_AT_ONCE)
            if time.monotonic() >= end:
                break
        start = time.monotonic()
        whole = self._whole(there)
        self._whole_s = time.monotonic() - start
        return whole

    def _whole(self, there: list[Path]) -> pa.Table:
        """The index of the files that are known and still there."""
        self._broken = {file: self._broken[file] for file in there if file in self._broken}
        self.notes = [f"{file.relative_to(self._folder.parent)} can't be read: {why}"
                      for file, why in self._broken.items()]
        self._files = [file for file in there if file in self._known]
        tables = [self._known[file] for file in self._files]
        counts = [len(table) for table in tables]
        index = pa.concat_tables([_empty().drop_columns("file"), *tables]).unify_dictionaries().combine_chunks()
        self._known = dict(zip(self._files, _parts(index, counts), strict=True))  # slices: no second copy is kept
        return index.append_column("file", pa.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts)))

    def _read(self, files: list[Path]) -> None:
        try:
            fields = pa.schema([*INDEXED, ("__fragment_index", pa.int32())])
            table = _dataset(files).to_table(columns=fields.names)
        except (OSError, pa.ArrowException) as error:
            if len(files) == 1:
                self._broken[files[0]] = " ".join(str(error).split())[:200]
            else:
                for file in files:
                    self._read([file])
            return
        number = _numbers(table["__fragment_index"])
        counts = np.bincount(number, minlength=len(files)).tolist()
        steps = np.repeat([_step(file) for file in files], counts)
        offsets = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        columns = {name: table[name].cast(INDEXED.field(name).type) for name in INDEXED.names}
        columns |= {name: columns[name].dictionary_encode() for name in WORDS}
        whole = pa.table({"step": pa.array(steps, pa.int32()), **columns, "offset": pa.array(offsets, pa.int32())})
        self._known |= dict(zip(files, _parts(whole, counts), strict=True))

    def hits(self, text: str, rows: np.ndarray, index: pa.Table) -> np.ndarray:
        of_file = _numbers(index["file"])
        wanted = np.unique(of_file[rows])
        found = [np.empty(0, dtype=np.int64)]
        for first in range(0, len(wanted), FILES_AT_ONCE):
            part = wanted[first:first + FILES_AT_ONCE]
            found.append(np.flatnonzero(np.isin(of_file, part))[self._have(part, of_file, text)])
        return np.intersect1d(np.concatenate(found), rows)

    def _have(self, numbers: np.ndarray, of_file: np.ndarray, text: str) -> np.ndarray:
        """(rows of these files,): which have the text. None of a file that has gone since: a run thins its old steps.
        """
        try:
            return _truth(_dataset([self._files[number] for number in numbers]).to_table(
                columns={"hit": _has("prompt", text) | _has("response", text)})["hit"])
        except (OSError, pa.ArrowException):
            if len(numbers) == 1:
                return np.zeros(int((of_file == numbers[0]).sum()), dtype=bool)
            return np.concatenate([self._have(numbers[i:i + 1], of_file, text) for i in range(len(numbers))])

    def read(self, rows: np.ndarray, index: pa.Table, columns: Sequence[str]) -> list[Record]:
        files, offsets = _numbers(index["file"])[rows], _numbers(index["offset"])[rows]
        found: list[Record] = [{} for _ in rows]
        for number in np.unique(files):
            places = np.flatnonzero(files == number)
            for place, row in zip(places, self._rows(int(number), offsets[places], columns), strict=True):
                found[place] = row
        return [row for row in found if row]

    def group(self, step: int, uid: int, attempt: int) -> list[Record]:
        found: list[Record] = []
        for file in sorted(self._folder.glob(f"step={step:06d}/[!.]*.parquet")):
            try:
                rows = pq.read_table(file, filters=[("uid", "=", uid), ("attempt", "=", attempt)], partitioning=None)
            except (OSError, pa.ArrowException):
                continue  # the table tells of it
            found += [{"step": step, **_with_parts(row)} for row in rows.to_pylist()]
        return found

    def _rows(self, number: int, offsets: np.ndarray, columns: Sequence[str]) -> list[Record]:
        """Of one file; empty ones where it has gone since."""
        file = self._files[number]
        try:
            with pq.ParquetFile(file) as opened:
                there = opened.schema_arrow.names
                table = opened.read(columns=[name for name in columns if name in there])
        except (OSError, pa.ArrowException):
            return [{} for _ in offsets]
        rows = table.take(pa.array(offsets)).to_pylist()
        return [{"step": _step(file), **_with_parts(row)} for row in rows]


class Samples:
    """samples.jsonl, of a run without rollouts/."""

    def __init__(self, run: Run) -> None:
        self.notes = [f"no rollouts are kept; these are from {SAMPLES}"]
        self.unread = 0
        self._run = run
        self._cursor = ""
        self._records: list[Record] = []

    def read_new(self, budget_s: float) -> pa.Table | None:
        lines = self._run.lines(SAMPLES, self._cursor)
        if not lines.records and not lines.anew:
            return None
        known = [] if lines.anew else self._records
        self._records, self._cursor = known + [_as_rollout(record) for record in lines.records], lines.cursor
        columns = {field.name: pa.array([record.get(field.name) for record in self._records], field.type)
                   for field in (pa.field("step", pa.int32()), *INDEXED)}
        return pa.table(columns | {name: columns[name].dictionary_encode() for name in WORDS})

    def hits(self, text: str, rows: np.ndarray, index: pa.Table) -> np.ndarray:
        has = [row for row in rows.tolist() if text in f"{self._records[row]['prompt']}\n"
               f"{self._records[row]['response']}".casefold()]
        return np.array(has, dtype=np.int64)

    def read(self, rows: np.ndarray, index: pa.Table, columns: Sequence[str]) -> list[Record]:
        return [self._records[row] for row in rows.tolist()]

    def group(self, step: int, uid: int, attempt: int) -> list[Record]:
        return []


def table_of(run: Run) -> Table:
    folder = run.path / ROLLOUTS
    return Table(Parquet(folder) if folder.is_dir() else Samples(run))


def _as_rollout(record: Mapping[str, object]) -> Record:
    return {"step": _number(record.get("step")), "row": record.get("row"), "data_set": record.get("set"),
            "prompt": str(record.get("prompt", "")), "response": str(record.get("completion", "")),
            "reward": _number(record.get("reward")), "parts": record.get("parts")}


def _with_parts(row: Record) -> Record:
    """The rewards' parts by their names."""
    return row | {"parts": {part["key"]: part["value"] for part in row.get("parts") or ()}}


def _number(value: object) -> Any:
    return value if isinstance(value, (int, float)) else None


def _dataset(files: list[Path]) -> ds.Dataset:
    """Columns that a file lacks are null."""
    schema = pa.schema([*INDEXED, ("prompt", pa.string()), ("response", pa.string())])
    return ds.dataset([str(file) for file in files], schema=schema, format="parquet")


def _has(column: str, text: str) -> ds.Expression:
    return pc.coalesce(pc.match_substring(pc.field(column), text, ignore_case=True), pa.scalar(False))


def _parts(table: pa.Table, counts: list[int]) -> list[pa.Table]:
    begins = [0, *np.cumsum(counts).tolist()]
    return [table.slice(begin, count) for begin, count in zip(begins[:-1], counts, strict=True)]


def _step(file: Path) -> int:
    match = STEP.fullmatch(file.parent.name)
    return int(match[1]) if match else -1


def _empty() -> pa.Table:
    empty = pa.schema([("step", pa.int32()), *INDEXED, ("offset", pa.int32()), ("file", pa.int32())]).empty_table()
    return pa.table({name: empty[name].dictionary_encode() if name in WORDS else empty[name]
                     for name in empty.column_names})


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(rows,): floats where some are null, which are nan."""
    return column.to_numpy()


def _truth(column: pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(column, False).to_numpy().astype(bool)


def _sorted(index: pa.Table, rows: np.ndarray, by: str, *, descending: bool) -> np.ndarray:
    """By that column, and then as they were written; what has no value comes last."""
    column = index[by].combine_chunks()
    if by in WORDS:  # by the place of a word among all of them
        words = column.dictionary
        place = pc.rank(words).to_numpy()
        codes = column.indices.to_numpy(zero_copy_only=False)
        keys = np.where(np.isnan(codes), np.nan, place[np.nan_to_num(codes).astype(int)]) if len(words) else codes
    else:
        keys = column.to_numpy(zero_copy_only=False)
    keys = keys.astype(float)[rows]
    return rows[np.argsort(-keys if descending else keys, kind="stable")]


def _choices(column: pa.ChunkedArray) -> list[str]:
    values = pc.unique(column.cast(pa.string())).to_pylist()
    return sorted(value for value in values if value is not None)


def _short(row: Record) -> Record:
    return {**row, **{name: str(row.get(name) or "")[:MOST_SHOWN] for name in ("prompt", "response")}}
