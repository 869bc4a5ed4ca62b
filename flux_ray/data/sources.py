"""What a data set's name stands for: which files, or which data set of the hub.

Takes:  a path, a glob, a folder, what `save_to_disk` wrote, a hub data set's name, a list of these, rows in memory.
Gives:  `load_rows`: the Rows of all of it, one after another.
Knows:  what of a folder are its data: all files of one format, or those of one split.
"""

from __future__ import annotations

import glob
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from flux_ray.data.files import MOST_SHOWN, format_of, known_formats, read_file
from flux_ray.data.rows import Broken, FileBegins, Row, Rows, first_line
from flux_ray.errors import UserError

#: What `save_to_disk` of the datasets library leaves in a folder: of a data set, and of one with splits.
SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
#: Words in the names of files by which a folder tells splits apart.
SPLITS = {"train", "training", "test", "validation", "valid", "val", "dev", "eval"}
Item = Row | Broken | FileBegins | None
IN_MEMORY = "prompts in memory"


def load_rows(
    source: str | Path | Sequence[object],
    *,
    split: str,
    max_rows: int | None,
    column: str = "prompt",
    on_bad_row: str = "stop",
) -> Rows:
    """Rows of a file, a folder, a glob, a hub data set (`name` or `name:subset`), of several paths, or in memory.

    `split` says which one of a hub data set, or of a folder with splits. A text in a list becomes a row with that text
    under `column`, so does a line of a .txt file; a list of Path objects is a list of files.
    UserError: nothing there, an unknown ending, no rows, an offline hub, and (unless on_bad_row is skip) a broken line.
    """
    paths = _paths_of(source)
    if paths is None:
        assert not isinstance(source, (str, Path))
        return Rows.from_dicts(IN_MEMORY, islice(_in_memory(source, column), max_rows), on_bad_row="stop")
    parts = [(name, read) for path in paths for name, read in _opened(path, split, column)]
    if len(parts) == 1:
        name, read = parts[0]
        return Rows.from_dicts(name, _first(read, max_rows), on_bad_row=on_bad_row)
    rows = (row for name, read in parts for row in itertools.chain([FileBegins(name)], read))
    name = f"{parts[0][0]} and {len(parts) - 1} more"
    return Rows.from_dicts(name, _first(rows, max_rows), on_bad_row=on_bad_row)


def _paths_of(source: object) -> list[str] | None:
    """The paths that a source names; None for rows in memory."""
    if isinstance(source, (str, Path)):
        return [str(source)]
    if isinstance(source, Sequence) and source and all(isinstance(item, Path) for item in source):
        return [str(item) for item in source]
    return None


def _in_memory(items: Iterable[object], column: str) -> Iterator[Row]:
    for number, item in enumerate(items, start=1):
        row = {column: item} if isinstance(item, str) else item
        if not isinstance(row, dict):
            raise UserError(f"{IN_MEMORY}: item {number} (from 1) is {type(row).__name__}, not a text or a dict")
        yield row


def _opened(source: str, split: str, column: str) -> list[tuple[str, Iterator[Row | Broken | None]]]:
    """(name, rows) of each file that a path stands for."""
    path = Path(source).expanduser()
    if path.is_file():
        return [(source, read_file(path, column))]
    if path.is_dir():
        return [(str(file), read_file(file, column)) for file in _files_in(path, split)]
    if glob.has_magic(source):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"{source}: no file matches")
        return [(str(file), read_file(file, column)) for file in files]
    if "://" in source:
        raise UserError(f"{source}: addresses aren't read: fetch it first (a hub's data set is NAME or NAME:SUBSET)")
    if format_of(path) is not None or source.startswith(("/", ".", "~")):
        raise UserError(f"{source}: no such file or folder")
    return [(f"{source} [{split}]", _read_hub(source, split))]


def _files_in(folder: Path, split: str) -> list[Path]:
    """The data files of a folder, in the order of their names; those of the split where they are told apart by it.

    As the hub's folders have it: train-00000-of-00002.parquet, test.jsonl, data/train/part.parquet.
    """
    if (folder / SAVED_SPLITS).is_file():
        splits = sorted(path.name for path in folder.iterdir() if (path / SAVED).is_file())
        if split not in splits:
            raise UserError(f"{folder}: no split {split!r} in it: it has {', '.join(splits)} (data.split, eval.split)")
        return _files_in(folder / split, split)
    if (folder / SAVED).is_file():
        return _saved_files(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and format_of(path) is not None
             and not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    words = {path: set(re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())) for path in files}
    told_apart = any(of_file & SPLITS for of_file in words.values())
    chosen = [path for path in files if split in words[path]] if told_apart else files
    if files and not chosen:
        raise UserError(f"{folder}: no file of split {split!r} in it (data.split, eval.split): it has "
                        f"{', '.join(path.name for path in files[:MOST_SHOWN])}")
    formats = sorted({str(format_of(path)) for path in chosen})
    if not chosen:
        raise UserError(f"{folder}: no data file in this folder: they end in {known_formats()}")
    if len(formats) > 1:
        raise UserError(f"{folder}: its files are of several kinds ({', '.join(formats)}): name those that are meant, "
                        f"e.g. {folder}/*{formats[0]}")
    return chosen


def _saved_files(folder: Path) -> list[Path]:
    """The files of what `save_to_disk` wrote, in their order."""
    try:
        state = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        files = [folder / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder}: its {SAVED} can't be read: {first_line(error)}") from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{folder}: {', '.join(missing[:MOST_SHOWN])} that {SAVED} names isn't there")
    return files


def _first(rows: Iterable[Item], max_rows: int | None) -> Iterator[Item]:
    """The first `max_rows` rows (none: all) and the blank lines among them."""
    num_rows = 0
    for row in rows:
        if num_rows == max_rows:
            return
        num_rows += not (row is None or isinstance(row, FileBegins))
        yield row


def _read_hub(name: str, split: str) -> Iterator[Row]:
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
    for row in data:
        yield dict(row)


def subset_names(error: Exception) -> str:
    """The list of a data set's subsets, where the library asks for one of them."""
    found = re.search(r"available configs: (\[.*?\])", str(error))
    return found[1] if found else ""
