"""What a checkpoint holds beside the trainer's state, which checkpoint counts, and when one is due.

Takes:  the loop's state; a folder of checkpoints.
Gives:  driver.json; `verify`, `newest_whole`, `find` for resume=PATH; `prune`, `forget_newer`; `Due`; best.json.
Knows:  a checkpoint counts once its driver.json is there; its folder gets its name last, with its manifest in it.
Never:  a pickle; takes a part of a checkpoint for the whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flux_ray.config import Config
from flux_ray.errors import UserError
from flux_ray.model.save import write_synced
from flux_ray.records import KeptGroup, LoopState
from flux_ray.run import manifest

STATE, BEST = "driver.json", "best.json"
#: In driver.json: a manifest belongs to the checkpoint. Those of earlier versions have none.
HAS_MANIFEST = "manifest"
NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Verified:
    """A checkpoint that was looked at."""

    path: Path
    problem: str | None   # why it can't be gone on with
    by_manifest: bool     # or it is of an earlier version: its files can be read, and nothing says what they must be


@dataclass(frozen=True)
class Best:
    """Which checkpoint's evaluation was the best, by which number."""

    metric: str   # as checkpoint.best has it: -eval/loss is for a number whose least is best
    step: int
    value: float

    @property
    def score(self) -> float:
        """The higher the better."""
        return -self.value if self.metric.startswith("-") else self.value


def save(folder: Path, state: LoopState) -> None:
    write_synced(folder / STATE, json.dumps({**asdict(state), HAS_MANIFEST: True}))


def load(folder: Path) -> LoopState:
    """UserError for one that this version can't read."""
    try:
        values = _state(folder)
        kept = tuple(KeptGroup(*one) for one in values.get("kept", ()))
        steps_of = {int(version): step for version, step in values.get("steps_of", {}).items()}
        return LoopState(**{**values, "unfinished": tuple(values["unfinished"]), "kept": kept, "steps_of": steps_of})
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {folder}: its {STATE} can't be read: {_short(error)}") from None
    except (TypeError, KeyError) as error:
        raise UserError(f"checkpoint {folder}: its {STATE} isn't one that this version reads: {error}") from None


def _state(folder: Path) -> dict[str, Any]:
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    values.setdefault("version", values.get("step"))  # of a time when a step and its version were one number
    values.pop(HAS_MANIFEST, None)
    return dict(values)


def _short(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error).partition(": line")[0]


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def all_of(checkpoints: Path) -> list[Path]:
    """Whatever bears a checkpoint's name, the oldest first."""
    return sorted((path for path in checkpoints.glob("step-*") if NAME.fullmatch(path.name)), key=step_of)


def whole(checkpoints: Path) -> list[Path]:
    """Checkpoints that count, the oldest first, without a look at their files."""
    return [path for path in all_of(checkpoints) if (path / STATE).is_file()]


def verify(folder: Path, *, read_all: bool = True) -> Verified:
    """Read a checkpoint through, each byte of it; or compare the sizes alone, where its manifest has them."""
    by_manifest = (folder / manifest.MANIFEST).is_file()
    problem = _problem_of_state(folder, by_manifest=by_manifest) or manifest.problem(folder, read_all=read_all)
    return Verified(folder, problem, by_manifest)


def _problem_of_state(folder: Path, *, by_manifest: bool) -> str | None:
    if not (folder / STATE).is_file():
        return f"{STATE} is missing: it wasn't written to its end"
    try:
        load(folder)
        claimed = json.loads((folder / STATE).read_text(encoding="utf-8")).get(HAS_MANIFEST)
    except UserError as error:
        return str(error).partition(": its ")[2]
    return f"{manifest.MANIFEST} is missing" if claimed and not by_manifest else None


def newest_whole(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be trusted, and a line on each newer one that can't, and on its own doubt."""
    lines: list[str] = []
    for path in reversed(all_of(checkpoints)):
        found = verify(path)
        if found.problem is None:
            doubt = f"{path} is unverified: an earlier version wrote it, without a {manifest.MANIFEST}"
            return path, [*lines, *([] if found.by_manifest else [doubt])]
        lines.append(f"{path} is passed over: {found.problem}")
    return None, lines


def find(path: str) -> tuple[Path, list[str]]:
    """The checkpoint that `resume=path` means, itself or the newest whole one of a run folder, and what to say of it.

    UserError where there is none, or the one that is named is broken.
    """
    folder = Path(path).expanduser().resolve()
    if (folder / STATE).is_file() or (NAME.fullmatch(folder.name) and folder.is_dir()):
        found = verify(folder)
        if found.problem is not None:
            raise UserError(f"resume={path}: the checkpoint is broken: {found.problem} (resume={folder.parent.parent} "
                            "takes the newest whole one)")
        return folder, [] if found.by_manifest else [f"{folder} is unverified: it has no {manifest.MANIFEST}"]
    newest, lines = newest_whole(folder / "checkpoints")
    if newest is None:
        why = f": {lines[0]}" if lines else " (checkpoint.every and checkpoint.every_s set how often one is made)"
        raise UserError(f"resume={path}: no whole checkpoint in {folder / 'checkpoints'}{why}")
    return newest, lines


def best(checkpoints: Path) -> Best | None:
    """The one that is marked; None where none is, it is gone, or the mark can't be read."""
    try:
        marked = Best(**json.loads((checkpoints / BEST).read_text(encoding="utf-8")))
        return marked if (checkpoint_folder(checkpoints, marked.step) / STATE).is_file() else None
    except (OSError, ValueError, TypeError):
        return None


def mark_best(checkpoints: Path, marked: Best) -> None:
    write_synced(checkpoints / BEST, json.dumps(asdict(marked)))


def prune(checkpoints: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints and the best, and what an interrupted save left; what is deleted."""
    marked = best(checkpoints)
    kept = set(whole(checkpoints)[-keep:])
    if marked is not None:
        kept.add(checkpoint_folder(checkpoints, marked.step))
    gone = [path for path in _left_over(checkpoints) if path not in kept]
    for path in gone:
        _delete(path)
    return gone


def _left_over(checkpoints: Path) -> Iterator[Path]:
    yield from sorted(path for path in checkpoints.glob("step-*") if path.is_dir())
    yield from checkpoints.glob(".step-*.writing")


def _delete(path: Path) -> None:
    (path / STATE).unlink(missing_ok=True)  # first: half a folder doesn't count
    shutil.rmtree(path, ignore_errors=True)


def forget_newer(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of steps after `step`, which a run resumed there does anew.

    Left in place they would count as the newest: `prune` would keep them and `find` would go on with them.
    """
    for path in checkpoints.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            _delete(path)
    if best(checkpoints) is None:
        (checkpoints / BEST).unlink(missing_ok=True)


class Due:
    """Whether a checkpoint is due at a step's end: by steps, or by the time since the last one was begun."""

    def __init__(self, config: Config, now_s: float) -> None:
        self._every, self._every_s, self._last_s = config.checkpoint.every, config.checkpoint.every_s, now_s

    def is_due(self, step: int, now_s: float) -> bool:
        by_step = bool(self._every) and step % self._every == 0
        return by_step or (bool(self._every_s) and now_s - self._last_s >= self._every_s)

    def saved(self, now_s: float) -> None:
        self._last_s = now_s
