"""What a checkpoint holds beside the trainer's state, and which checkpoint counts.

Takes:  the loop's state; the groups that are trained.
Gives:  a checkpoint, with the state as driver.json; `find` for resume=PATH; `prune`, `forget_newer`; the final model.
Knows:  a checkpoint counts once its driver.json is there: it is written last.
Never:  a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flux_ray.cluster.group import Group, all_within
from flux_ray.errors import UserError
from flux_ray.protocols import Trains
from flux_ray.records import LoopState

STATE = "driver.json"


def save(folder: Path, state: LoopState) -> None:
    temporary = folder / f"{STATE}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(asdict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / STATE)


def load(folder: Path) -> LoopState:
    """UserError for one that this version can't read."""
    values = json.loads((folder / STATE).read_text(encoding="utf-8"))
    values.setdefault("version", values.get("step"))  # of a time when a step and its version were one number
    try:
        return LoopState(**{**values, "unfinished": tuple(values["unfinished"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"checkpoint {folder}: its {STATE} isn't one that this version reads: {error}") from None


def checkpoint_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def whole(checkpoints: Path) -> list[Path]:
    """Checkpoints that count, the oldest first."""
    found = [
        path
        for path in checkpoints.glob("step-*")
        if re.fullmatch(r"step-\d{6,}", path.name) and (path / STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find(path: str) -> Path:
    """The checkpoint that `resume=path` means: itself, or the newest of a run folder. UserError where there is none."""
    folder = Path(path).expanduser().resolve()
    if (folder / STATE).is_file():
        return folder
    found = whole(folder / "checkpoints")
    if not found:
        raise UserError(
            f"resume={path}: no whole checkpoint in {folder / 'checkpoints'} "
            "(checkpoint.every sets how often one is made)"
        )
    return found[-1]


async def save_whole(
    checkpoints: Path, state: LoopState, trained: Sequence[Group[Trains]], *, keep: int, deadline_s: float,
) -> None:
    """A checkpoint of each group that is trained, by its role, and of the loop; older ones beyond `keep` go."""
    folder = checkpoint_folder(checkpoints, state.step)
    folder.mkdir(parents=True, exist_ok=True)
    await all_within([rank.call(Trains.save_checkpoint, str(folder / group.role)) for group in trained
                      for rank in group], deadline_s)
    save(folder, state)
    prune(checkpoints, keep)


async def save_models(folder: Path, trained: Sequence[Group[Trains]], *, deadline_s: float) -> None:
    """What the first group trains in `folder`; any other's beside it, by its role."""
    folders = [folder, *(folder.with_name(group.role) for group in trained[1:])]
    await all_within([rank.call(Trains.save_model, str(into)) for into, group in zip(folders, trained, strict=True)
                      for rank in group], deadline_s)


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted save left behind."""
    kept = set(whole(checkpoints)[-keep:])
    for path in checkpoints.glob("step-*"):
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def forget_newer(checkpoints: Path, step: int) -> None:
    """Delete the checkpoints of steps after `step`, which a run resumed there does anew.

    Left in place they would count as the newest: `prune` would keep them and `find` would go on with them.
    """
    for path in checkpoints.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            (path / STATE).unlink(missing_ok=True)  # first: half a folder doesn't count
            shutil.rmtree(path, ignore_errors=True)
