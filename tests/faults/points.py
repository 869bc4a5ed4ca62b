"""Places in the program where a process of a real run ends itself by SIGKILL, one place after the other.

Takes:  names of POINTS in their order; a folder, where a mark tells that a process has ended at a point.
Gives:  `plugin`, a file for a run's `plugins`, which each process imports; `marks`.
Knows:  the kill is real, and so is all around it: only its moment is chosen. A point waits for some calls, so that the
        run has got further than when the point before struck.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DRIVER, RANK_0, RANK_1, ENGINE = "driver", "trainer-0", "trainer-1", "engine-0"
STARTED = "terminal.txt"  # where a driver's output goes


class Point(NamedTuple):
    process: str  # by the name of its log
    module: str
    name: str  # of a function there, or of a class's method
    after: bool = False  # it has returned
    calls: int = 6  # it strikes at this one


PUBLISH, SENDER = "flux_ray.weights.publish", "flux_ray.weights.sender"
SERVING, TRAINING = "flux_ray.rollout.engine", "flux_ray.train.engine"
LOOP, RANKS, SAVING = "flux_ray.driver.loop", "flux_ray.driver.ranks", "flux_ray.run.saving"
RECORDER = "flux_ray.run.recorder"

POINTS = {
    "publish: rank 0 is asked": Point(RANK_0, PUBLISH, "Publisher.publish"),
    "publish: before engines are told": Point(RANK_0, PUBLISH, "EngineClient.begin_weight_update"),
    "publish: before the first bucket": Point(RANK_0, SENDER, "GlooSender._send"),
    "publish: after the last bucket": Point(RANK_0, SENDER, "GlooSender._send", after=True),
    "publish: before engines load": Point(RANK_0, PUBLISH, "EngineClient.finish_weight_update"),
    "publish: engines have attested": Point(RANK_0, PUBLISH, "Publisher.publish", after=True),
    "publish: the engine is told": Point(ENGINE, SERVING, "RolloutEngine.begin_weight_update"),
    "publish: the engine has all": Point(ENGINE, SERVING, "RolloutEngine.begin_weight_update", after=True),
    "publish: the engine loads": Point(ENGINE, SERVING, "RolloutEngine.finish_weight_update"),
    "publish: the engine has loaded": Point(ENGINE, SERVING, "RolloutEngine.finish_weight_update", after=True),
    "rank: before forward": Point(RANK_1, TRAINING, "Engine.accumulate"),
    "rank: between forward and backward": Point(RANK_1, TRAINING, "Engine._balance"),
    "rank: before the optimizer": Point(RANK_1, TRAINING, "Engine._optimizer_step"),
    "rank: after the optimizer": Point(RANK_1, TRAINING, "Engine._optimizer_step", after=True),
    "rank: before it writes a checkpoint": Point(RANK_0, "flux_ray.train.checkpoint", "_write", calls=2),
    "rank: a checkpoint is written": Point(RANK_0, "flux_ray.train.checkpoint", "_write", after=True, calls=2),
    "step: before it takes groups": Point(DRIVER, LOOP, "Loop._begin_step"),
    "step: before ranks train": Point(DRIVER, RANKS, "Ranks.train"),
    "step: ranks have trained": Point(DRIVER, RANKS, "Ranks.train", after=True),
    "step: before a publish": Point(DRIVER, RANKS, "Ranks.publish"),
    "end: after a publish": Point(DRIVER, RANKS, "Ranks.publish", after=True),
    "end: before the ledger's line": Point(DRIVER, RECORDER, "Recorder.account"),
    "end: between ledger and metrics": Point(DRIVER, RECORDER, "Recorder.account", after=True),
    "end: after the metrics": Point(DRIVER, RECORDER, "Recorder.step", after=True),
    "commit: before it": Point(DRIVER, SAVING, "Saver.save", calls=2),
    "commit: all parts are there": Point(DRIVER, SAVING, "_commit", calls=2),
    "commit: before the manifest": Point(DRIVER, "flux_ray.run.manifest", "write", calls=2),
    "commit: before the rename": Point(DRIVER, "flux_ray.run.manifest", "unusable", calls=2),
    "commit: after the rename": Point(DRIVER, SAVING, "_commit", after=True, calls=2),
}

PLUGIN = """from tests.faults.points import arm
arm({points!r}, {marks!r})
"""


def plugin(folder: Path, points: Sequence[str]) -> Path:
    """A file that makes a run's processes end at these points."""
    file = folder / "ends_at_points.py"
    marks(folder).mkdir(parents=True)
    file.write_text(PLUGIN.format(points=list(points), marks=str(marks(folder))))
    return file


def marks(folder: Path) -> Path:
    """A file in it for each point that has struck, named by its place."""
    return folder / "marks"


def arm(points: Sequence[str], folder: str) -> None:
    """In each process: those of the points that are its own."""
    log = Path(os.readlink("/proc/self/fd/1"))
    process = DRIVER if log.name == STARTED else log.stem
    for place, name in enumerate(points):
        point = POINTS[name]
        if point.process == process:
            _wrap(point, functools.partial(_is_next, Path(folder), place), Path(folder, str(place)))


def _is_next(folder: Path, place: int) -> bool:
    """Whether all points before have struck, and this one has not."""
    return len(os.listdir(folder)) == place


def _wrap(point: Point, is_next: Callable[[], bool], mark: Path) -> None:
    owner: Any = importlib.import_module(point.module)
    *outer, name = point.name.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), [0]

    def strike() -> None:
        calls[0] += is_next()
        if calls[0] == point.calls:
            mark.touch(exist_ok=False)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # until it is dead

    @functools.wraps(original)
    async def coroutine(*args: Any, **kwargs: Any) -> Any:
        if not point.after:
            strike()
        result = await original(*args, **kwargs)
        if point.after:
            strike()
        return result

    @functools.wraps(original)
    def function(*args: Any, **kwargs: Any) -> Any:
        if not point.after:
            strike()
        result = original(*args, **kwargs)
        if point.after:
            strike()
        return result

    setattr(owner, name, coroutine if inspect.iscoroutinefunction(original) else function)
