"""Real faults in real runs: `python -m tests.faults.chaos [ROW ...] [--seed N] [--folder F]`, or launch/chaos.sh.

Takes:  names of rows, all of them without any; a seed, which the moments of all faults follow from; a folder, where
        undisturbed runs stay for the next time.
Gives:  a row of a table for each: what was done, how the run ended, what the audit says, whether the weights are those
        of the undisturbed run. The exit code is 1 where one didn't end as it must.
Knows:  a run is a small one with a real engine, two ranks, and a checkpoint every few steps. Goodput: of the steps that
        were done, the share that counts: those that were done again don't.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import psutil

from flux_ray.audit import audit
from tests.faults import points
from tests.faults.points import DRIVER, POINTS
from tests.system.conftest import make_toys
from tests.system.program import Program, actor_of, metrics
from tests.system.small_run import options

STEPS, CHECKPOINT_EVERY = 24, 4
DEADLINE_S = 1500.0  # of a run, all its faults included
ALL_START_DEADLINE_S = 240.0  # after Ray's own death, until the last actor is there again
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
CORE, GCS, RAYLET = "core", "gcs_server", "raylet"
LOOK_EVERY_S = 0.05
NO_MODEL = "no model"


@dataclass(frozen=True)
class Fault:
    target: str  # an actor by its log's name, or one of the above
    signal: signal.Signals = KILL
    at: float = 0.5  # share of the run's steps that are done


@dataclass(frozen=True)
class Row:
    faults: Callable[[random.Random], list[Fault]]
    asks: dict[str, object] = field(default_factory=dict)  # further options
    same_weights: bool = True  # as of the undisturbed run with these options
    steps: int = STEPS
    points: tuple[str, ...] = ()  # where processes end themselves, instead


@dataclass
class Outcome:
    code: int
    seconds: float
    ready_s: float  # from the first start
    delays_s: list[float]  # from each fault to the next step
    verdict: str
    weights: str
    audited: str
    goodput: float = 1.0


def _one(target: str, number: signal.Signals = KILL) -> Callable[[random.Random], list[Fault]]:
    return lambda chance: [Fault(target, number, chance.uniform(0.2, 0.8))]


def _several(target: str, count: int) -> Callable[[random.Random], list[Fault]]:
    return lambda chance: [Fault(target, KILL, at) for at in sorted(chance.uniform(0.05, 0.95) for _ in range(count))]


def _while_ray_is_dead(target: str) -> Callable[[random.Random], list[Fault]]:
    """The actor dies at the step after Ray's server, before that one's death has ended the run's first life."""
    def faults(chance: random.Random) -> list[Fault]:
        at = chance.uniform(0.2, 0.8)
        return [Fault(GCS, KILL, at), Fault(target, KILL, at)]

    return faults


def _of_all_kinds(count: int) -> Callable[[random.Random], list[Fault]]:
    """Actors of all roles die and stand still. What would notice that one stands still, Ray and the driver, dies."""
    actors = ["engine-0", CORE, "rollout-0", "reference-0", "reward-0", "trainer-0", "trainer-1"]

    def faults(chance: random.Random) -> list[Fault]:
        moments = sorted(chance.uniform(0.02, 0.97) for _ in range(count))
        targets = [chance.choice([*actors, GCS, RAYLET, DRIVER]) for _ in moments]
        return [Fault(target, chance.choice([KILL, KILL, KILL, STOP]) if target in actors else KILL, at)
                for target, at in zip(targets, moments, strict=True)]

    return faults


def _none(chance: random.Random) -> list[Fault]:
    return []


def _at(process: str, what: str) -> Row:
    """The process ends itself at each of the points of that kind."""
    found = [name for name, point in POINTS.items() if point.process == process and name.startswith(f"{what}: ")]
    return Row(_none, steps=60, points=tuple(found))


REFERENCE = {"algo.beta": 0.01}
ROWS: dict[str, Row] = {
    "kill engine": Row(_one("engine-0")),
    "kill core": Row(_one(CORE)),
    "kill rollout worker": Row(_several("rollout-0", 3)),
    "kill reference": Row(_one("reference-0"), REFERENCE),
    "kill reward worker": Row(_one("reward-0")),
    "kill rank 0": Row(_several("trainer-0", 2)),
    "kill rank 1": Row(_several("trainer-1", 2)),
    "kill gcs": Row(_one(GCS)),
    "kill gcs, then a rollout worker": Row(_while_ray_is_dead("rollout-0")),
    "kill gcs, then rank 1": Row(_while_ray_is_dead("trainer-1")),
    "kill raylet": Row(_one(RAYLET)),
    "kill driver": Row(_several(DRIVER, 4)),
    "stop engine": Row(_one("engine-0", STOP)),
    "stop core": Row(_one(CORE, STOP)),
    "stop rank": Row(_one("trainer-1", STOP)),
    "stop rollout worker": Row(_one("rollout-0", STOP)),
    "kill one engine of two, asynchronous": Row(
        _several("engine-1", 3), {"rollout.num_engines": 2, "driver.max_staleness": 1}, same_weights=False, steps=60),
    "kill driver, asynchronous": Row(_several(DRIVER, 2), {"driver.max_staleness": 1}, same_weights=False),
    "kill driver, deterministic asynchronous": Row(
        _several(DRIVER, 2), {"driver.max_staleness": 1, "driver.deterministic": True}),
    "kill rank 0 in a publish": _at("trainer-0", "publish"),
    "kill engine in a publish": _at("engine-0", "publish"),
    "kill rank 1 in a step": _at("trainer-1", "rank"),
    "kill rank 0 in a checkpoint": _at("trainer-0", "rank"),
    "kill driver in a step": _at(DRIVER, "step"),
    "kill driver at a step's end": _at(DRIVER, "end"),
    "kill driver in a checkpoint": _at(DRIVER, "commit"),
    "soak": Row(_of_all_kinds(30), REFERENCE, steps=300),
    "short soak": Row(_of_all_kinds(8), REFERENCE, steps=60),
}


def run(folder: Path, toys: SimpleNamespace, row: Row, faults: list[Fault]) -> Outcome:
    values = {**options(toys, toys.tied), "data.train": toys.data, "run_dir": folder / "run", **row.asks,
              "driver.num_steps": row.steps, "checkpoint.every": CHECKPOINT_EVERY}
    folder.mkdir(parents=True)
    if row.points and not faults:
        values["plugins"] = [str(points.plugin(folder, row.points))]
    disturbed = _Disturbed(folder, values)
    try:
        for fault in faults:
            disturbed.by(fault, done=min(int(fault.at * row.steps), row.steps - 1))
        for place, name in enumerate(row.points if "plugins" in values else ()):
            disturbed.at(name, place)
        code = disturbed.program.end(deadline_s=DEADLINE_S)
    finally:
        disturbed.program.end_all()
    sums = audit(folder / "run")
    return Outcome(code, time.monotonic() - disturbed.started_s, disturbed.ready_s, disturbed.delays_s,
                   "clean" if sums.is_clean else "NOT CLEAN", _sha(folder / "run" / "model"),
                   f"{len(sums.lost)} lost, {len(sums.twice)} twice", goodput(folder / "run", row.steps))


class _Disturbed:
    """A run that goes on, in several programs where its driver is killed."""

    def __init__(self, folder: Path, values: dict[str, object]) -> None:
        self._folder, self._values, self._run_dir = folder, values, folder / "run"
        self.started_s, self.ready_s, self.delays_s = time.monotonic(), 0.0, list[float]()
        self.program = self._start()

    def _start(self, **more: object) -> Program:
        return Program([f"{key}={value}" for key, value in {**self._values, **more}.items()], folder=self._folder)

    def by(self, fault: Fault, *, done: int) -> None:
        """Strike once so many steps are done; until it is past that."""
        self._until(lambda: len(metrics(self._run_dir)) >= done)
        self.ready_s = self.ready_s or time.monotonic() - self.started_s
        if self.program.process.poll() is None and _strike(self.program, self._run_dir, fault):
            self._until_past(driver=fault.target == DRIVER)

    def at(self, name: str, place: int) -> None:
        """Until a process has ended itself at this point, and the run is past that."""
        mark = points.marks(self._folder) / str(place)
        self._until(mark.exists)
        print(f"  {name}, after {len(metrics(self._run_dir))} steps", flush=True)
        self._until_past(driver=POINTS[name].process == DRIVER)

    def _until_past(self, *, driver: bool) -> None:
        """The fault has just struck: until a step beyond all those before is done."""
        struck_s, wall_s, done = time.monotonic(), time.time(), len(metrics(self._run_dir))
        if driver:
            self.program.process.wait(30)
            self.program.end_all()
            self.program = self._start(resume="auto")
        file = self._run_dir / "metrics.jsonl"
        self._until(lambda: file.stat().st_mtime > wall_s and len(metrics(self._run_dir)) > done)
        self.delays_s.append(time.monotonic() - struck_s)

    def _until(self, true: Callable[[], bool]) -> None:
        """Or until the program ends: whether it ends well is seen later."""
        deadline_s = time.monotonic() + DEADLINE_S
        while self.program.process.poll() is None and not true() and time.monotonic() < deadline_s:
            time.sleep(LOOK_EVERY_S)


def goodput(run_dir: Path, num_steps: int) -> float:
    """Steps that count, of all that were done."""
    done = re.findall(r" step +\d+/\d+  ", (run_dir / "run.log").read_text())
    return num_steps / max(len(done), num_steps)


def _strike(program: Program, run_dir: Path, fault: Fault) -> bool:
    """Whether there was somebody to strike: an actor may be just starting."""
    for process in _targets(program, run_dir, fault.target):
        try:
            process.send_signal(fault.signal)
        except psutil.NoSuchProcess:
            continue
        print(f"  {fault.signal.name} {fault.target} after {len(metrics(run_dir))} steps", flush=True)
        return True
    return False


def _targets(program: Program, run_dir: Path, target: str) -> Iterator[psutil.Process]:
    if target == DRIVER:
        yield psutil.Process(program.process.pid)
    elif target in (GCS, RAYLET, CORE):
        name = "VLLM::EngineCor" if target == CORE else target
        yield from (process for process in program.processes() if process.name().startswith(name))
    else:
        yield actor_of(run_dir / "logs" / f"{target}.log", deadline_s=ALL_START_DEADLINE_S)


def _sha(model: Path) -> str:
    file = model / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else NO_MODEL


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))  # else its runs would go on
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no row {sorted(unknown)[0]!r}; there are: {', '.join(ROWS)}")
    lines, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="flux-ray-chaos-") as temporary:
        Path(temporary, "toys").mkdir()
        toys = make_toys(Path(temporary, "toys"))
        for name in asked.rows or ROWS:
            row = ROWS[name]
            faults = row.faults(random.Random(f"{name} {asked.seed}"))
            print(f"{name}: {', '.join(f'{f.signal.name} {f.target} at {f.at:.2f}' for f in faults)}", flush=True)
            wanted = _undisturbed(asked.folder or Path(temporary), toys, row) if row.same_weights else None
            outcome = run(Path(temporary, name), toys, row, faults)
            same = outcome.weights == wanted if row.same_weights else None
            right = outcome.code == 0 and outcome.verdict == "clean" and same is not False
            failed += not right
            lines.append(_line(name, len(faults) or len(row.points), outcome, same, right))
            print(lines[-1], flush=True)
    print("\n".join(["", *HEAD, *lines]))
    return int(bool(failed))


def _undisturbed(folder: Path, toys: SimpleNamespace, row: Row) -> str:
    """The weights of the run that nothing disturbs, with these options."""
    kind = hashlib.sha256(f"{row.asks} {row.steps}".encode()).hexdigest()[:8]
    found = folder / f"undisturbed {kind}"
    if _sha(found / "run" / "model") == NO_MODEL:
        shutil.rmtree(found, ignore_errors=True)
        run(found, toys, replace(row, points=()), [])
    return _sha(found / "run" / "model")


HEAD = ("| fault | times | exit | audit | weights | goodput | start, s | delay, s | |",
        "|---|---|---|---|---|---|---|---|---|")


def _line(name: str, times: int, outcome: Outcome, same: bool | None, right: bool) -> str:
    weights = {True: "the same", False: "OTHERS", None: "-"}[same]
    delays = ", ".join(f"{delay_s:.0f}" for delay_s in outcome.delays_s)
    return (f"| {name} | {times} | {outcome.code} | {outcome.verdict}: {outcome.audited} | {weights} | "
            f"{outcome.goodput:.0%} | {outcome.ready_s:.0f} | {delays} | {'right' if right else 'WRONG'} |")


if __name__ == "__main__":
    sys.exit(main())
