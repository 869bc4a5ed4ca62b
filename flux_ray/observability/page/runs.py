"""A run's folder as people look at it: whole or half-written, of any age, still going on or not.

Takes:  the folder.
Gives:  `Run`: its state, the lines of its files, its options; `found_runs`, of what a command line names.
Knows:  a file that grows is read from where the last look ended; one that was written anew is read from its start.
Never:  changes anything; fails for what is missing or broken: `notes` say what is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from flux_ray import config as configs
from flux_ray import run_dir
from flux_ray.accounts import LEDGER
from flux_ray.errors import UserError
from flux_ray.observability.run_folder import EVAL, METRICS, SAMPLES

ROLLOUTS, TRACES = "rollouts", "traces"
#: A folder with one of these is a run's.
SIGNS = (run_dir.CONFIG, METRICS, EVAL, SAMPLES, ROLLOUTS)
Record = dict[str, Any]  # a JSON object, or a row by its columns
ENDED = {"done": "is done", "failed": "failed", "interrupted": "was interrupted"}
MOST_NAMED = 5  # runs that a message names


@dataclass(frozen=True)
class Lines:
    """What a look at a .jsonl file gave."""

    records: list[Record]
    cursor: str  # where the next look begins
    anew: bool  # these are the file's first lines: what was known of it before no longer holds
    broken: int  # lines that hold no JSON object


class Run:
    """One run; `name` tells it from the others that are looked at."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name

    def lines(self, file: str, cursor: str = "") -> Lines:
        """Those that have come since `cursor`. A last line without its end is still being written, and is left out."""
        try:
            with (self.path / file).open("rb") as stream:
                inode = Path(self.path, file).stat().st_ino
                before, _, offset = cursor.partition("-")
                size = stream.seek(0, 2)
                goes_on = before == str(inode) and int(offset) <= size
                begin = int(offset) if goes_on else 0
                stream.seek(begin)
                whole, end, _ = stream.read().rpartition(b"\n")
        except (OSError, ValueError):
            return Lines([], "", not cursor, 0)
        found = [_object(line) for line in whole.split(b"\n") if line.strip()]
        records = [record for record in found if record is not None]
        return Lines(records, f"{inode}-{begin + len(whole) + len(end)}", begin == 0, len(found) - len(records))

    @property
    def state(self) -> str:
        """How it stands, as the end of a sentence. A run that was resumed may have ended before."""
        if run_dir.is_held(self.path):
            return "goes on"
        last = self.lines(LEDGER).records[-1:]
        if last and "ended" in last[0]:
            return ENDED.get(str(last[0]["ended"]), str(last[0]["ended"]))
        return "was killed" if (self.path / LEDGER).exists() else "has ended"

    def options(self) -> Record:
        """Option ► value, dotted, as config.yaml has them; none where it can't be read."""
        return _options(self.path / run_dir.CONFIG)[0]

    def trace_steps(self) -> list[int]:
        """Steps that have a time line."""
        digits = [file.stem.removeprefix("step-") for file in (self.path / TRACES).glob("step-*.json")]
        return sorted(int(step) for step in digits if step.isdecimal())

    def notes(self) -> list[str]:
        """What is missing or broken: a line each."""
        found = []
        for file, what in ((METRICS, "curves"), (EVAL, "evaluations")):
            lines = self.lines(file)
            if lines.broken:
                found.append(f"{file}: {lines.broken} lines hold no JSON object and are left out")
            elif not lines.records:
                found.append(f"no {what}: {file} is not there" if not (self.path / file).exists()
                             else f"no {what} yet: {file} is empty")
        if not (self.path / ROLLOUTS).is_dir():
            instead = f"{SAMPLES} alone is shown" if (self.path / SAMPLES).exists() else f"nor is {SAMPLES}"
            found.append(f"no rollouts: {ROLLOUTS}/ is not there; {instead}")
        trouble = _options(self.path / run_dir.CONFIG)[1]
        return [*found, *([trouble] if trouble else [])]


def _object(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # UnicodeDecodeError is one
        return None
    return record if isinstance(record, dict) else None


def _options(file: Path) -> tuple[Record, str]:
    """The options, and why there are none."""
    if not file.is_file():
        return {}, f"no config: {file.name} is not there"
    try:
        tree = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        return {}, f"{file.name} can't be read: {' '.join(str(error).split())}"
    if not isinstance(tree, DictConfig):
        return {}, f"{file.name} holds no options"
    return dict(_leaves(configs.as_written(tree), "")), ""


def _leaves(values: Record, prefix: str) -> Iterator[tuple[str, object]]:
    """Dotted, by the names that stand there: an older run may have options that are no more."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def found_runs(folders: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs, and a line for each folder that holds none. UserError where none of them is a run's.

    Two that have one name get as much of their paths as tells them apart.
    """
    paths, wrong = [], []
    for folder in folders:
        path = Path(folder).expanduser().absolute()
        trouble = _no_run(path)
        if trouble:
            wrong.append(trouble)
        elif path not in paths:
            paths.append(path)
    if not paths:
        raise UserError("; ".join(wrong))
    return [Run(path, name) for path, name in zip(paths, _short_names(paths), strict=True)], wrong


def _no_run(path: Path) -> str:
    """Why the folder isn't a run's; empty where it is."""
    if not path.is_dir():
        return f"{path} is no folder" if path.exists() else f"there is no folder {path}"
    if is_run(path):
        return ""
    below = sorted(folder for folder in path.iterdir() if folder.is_dir() and is_run(folder))
    some = ", ".join(map(str, below[-MOST_NAMED:]))
    return f"{path} is no run's folder" + (f"; these below it are: {some}" if below else
                                           f": it has none of {', '.join(SIGNS)}")


def is_run(path: Path) -> bool:
    """Whether a run has written there. A config.yaml may be any program's: a run's names an algorithm."""
    options, _ = _options(path / run_dir.CONFIG)
    return any((path / sign).exists() for sign in (METRICS, EVAL, SAMPLES, ROLLOUTS)) or "algo.name" in options


def _short_names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(path.parts) for path in paths)):
        short = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(short)) == len(short):
            return short
    return [str(path) for path in paths]


def differences(of_runs: Iterable[Record]) -> list[str]:
    """The options that don't have one value in all of these configs."""
    every = list(of_runs)
    keys = sorted({key for options in every for key in options})
    return [key for key in keys if any(options.get(key) != every[0].get(key) for options in every)]
