"""What a checkpoint's files must be, written down beside them, and whether they are.

Takes:  a checkpoint's folder.
Gives:  `write`, the sizes and SHA-256 of its files as manifest.json; `problem`: why it can't be trusted, in one line;
        `unusable`, of its numbers alone.
Knows:  numbers that aren't finite make a checkpoint as useless as a file that was cut.
Never:  loads a whole file into memory; a pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from flux_ray.model.save import write_synced

MANIFEST = "manifest.json"
FORMAT = 1
READERS = 4  # files that are read at once


def write(folder: Path) -> None:
    """Sizes and sums of all files under `folder`, which are on disk already. Reads them: for a thread."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    with ThreadPoolExecutor(READERS) as threads:
        sums = list(threads.map(_sha256, files))
    entries = {str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": found}
               for path, found in zip(files, sums, strict=True)}
    write_synced(folder / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n")


def problem(folder: Path, *, read_all: bool = True) -> str | None:
    """Why the files under `folder` can't be trusted, of the first that can't; None where nothing is wrong.

    Without a manifest (none is there, and none is claimed) each file must at least be readable. Reads every byte, or
    (read_all=False) none but the manifest.
    """
    try:
        expected = _expected(folder) if (folder / MANIFEST).is_file() else {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__})"
    for name, (size, _) in expected.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (folder / name).stat().st_size != size:
            return f"{name} has {(folder / name).stat().st_size} bytes, {MANIFEST} says {size}"
    if not read_all:
        return None
    wrong = _first(lambda entry: _wrong_sum(folder, *entry), [(name, found) for name, (_, found) in expected.items()])
    return wrong or unusable(folder)


def unusable(folder: Path) -> str | None:
    """Why the numbers in the files under `folder` can't be used, whatever the sums are; None where they can."""
    return _first(lambda path: _unusable(folder, path), sorted(
        path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")))


def _expected(folder: Path) -> dict[str, tuple[int, str]]:
    """File ► its size and sum."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest["format"] != FORMAT:
        raise ValueError(manifest["format"])
    return {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}


def _first(look: Callable[[Any], str | None], of: Iterable[Any]) -> str | None:
    """The first answer that isn't None."""
    with ThreadPoolExecutor(READERS) as threads:
        return next(filter(None, threads.map(look, of)), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _wrong_sum(folder: Path, name: str, expected: str) -> str | None:
    try:
        return None if _sha256(folder / name) == expected else f"{name} isn't what was written: its SHA-256 is another"
    except OSError as error:
        return f"{name} can't be read: {error.strerror}"


def _unusable(folder: Path, path: Path) -> str | None:
    """Why a file of ours can't be used, whatever its sum is."""
    from safetensors import SafetensorError

    try:
        return f"{path.relative_to(folder)}: {found}" if (found := _content(path)) else None
    except (OSError, ValueError, SafetensorError) as error:
        return f"{path.relative_to(folder)} can't be read: {' '.join(str(error).split())}"


def _content(path: Path) -> str | None:
    """What is wrong with the numbers in a file. Raises where it is no JSON, or no safetensors."""
    from safetensors import safe_open

    if path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
        return None
    with safe_open(path, framework="pt") as file:
        for name in list(file.keys()):
            tensor = file.get_tensor(name)
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"{name} isn't finite"
    return None
