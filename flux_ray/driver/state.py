"""What a checkpoint holds beside the trainer's state, and which checkpoint counts.

Takes:  the loop's position.
Gives:  `LoopState`, saved as driver.json in the checkpoint's folder; `find` for resume=PATH; `prune`, `forget_newer`.
Knows:  a checkpoint counts once its driver.json is there: it is written last.
Never:  a pickle.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux_ray.errors import UserError

if TYPE_CHECKING:
    from flux_ray.driver.rooms import TrainingRooms

STATE = "driver.json"


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands after `step` steps.

    >>> LoopState(step=3, next_uid=96, unfinished=(), prompts_dropped=0).step
    3
    """

    step: int  # steps done, and so the policy's version
    next_uid: int  # the next prompt of the stream
    unfinished: tuple[int, ...] = ()  # prompts started and not trained on: they start again
    prompts_dropped: int = 0


def save(folder: Path, state: LoopState) -> None:
    temporary = folder / f"{STATE}.tmp"
    with temporary.open("w") as file:
        json.dump(asdict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / STATE)


def load(folder: Path) -> LoopState:
    values = json.loads((folder / STATE).read_text())
    return LoopState(**{**values, "unfinished": tuple(values["unfinished"])})


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


async def save_whole(checkpoints: Path, state: LoopState, rooms: TrainingRooms, *, keep: int) -> None:
    """A checkpoint of what is trained and of the loop; older ones beyond `keep` go."""
    folder = checkpoint_folder(checkpoints, state.step)
    folder.mkdir(parents=True, exist_ok=True)
    await rooms.save_checkpoint(folder)
    save(folder, state)
    prune(checkpoints, keep)


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
