"""Real faults in real runs: `python -m tests.faults.chaos [ROW ...] [--seed N]`, or launch/chaos.sh.

Takes:  names of rows, all of them without any; a seed, which the moments of all faults follow from.
Gives:  a row of a table for each: what was done, how the run ended, what the audit says, whether the weights are those
        of the undisturbed run. The exit code is 1 where one didn't end as it must.
Knows:  a run is a small one with a real engine, two ranks, and a checkpoint every few steps.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import psutil

from flux_ray.audit import audit
from tests.system.conftest import make_toys
from tests.system.program import Program, actor_of, metrics
from tests.system.small_run import options

STEPS, CHECKPOINT_EVERY = 24, 4
DEADLINE_S = 1500.0  # of a run, all its faults included
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
CORE, GCS, RAYLET, DRIVER = "core", "gcs_server", "raylet", "driver"


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


@dataclass
class Outcome:
    code: int
    seconds: float
    ready_s: float  # from the first start
    delays_s: list[float]  # from each fault to the next step
    verdict: str
    weights: str
    audited: str


def _one(target: str, number: signal.Signals = KILL) -> Callable[[random.Random], list[Fault]]:
    return lambda chance: [Fault(target, number, chance.uniform(0.2, 0.8))]


def _several(target: str, count: int) -> Callable[[random.Random], list[Fault]]:
    return lambda chance: [Fault(target, KILL, at) for at in sorted(chance.uniform(0.05, 0.95) for _ in range(count))]


def _of_all_kinds(count: int) -> Callable[[random.Random], list[Fault]]:
    targets = ["engine-0", CORE, "rollout-0", "reference-0", "reward-0", "trainer-0", "trainer-1", GCS, RAYLET, DRIVER]

    def faults(chance: random.Random) -> list[Fault]:
        moments = sorted(chance.uniform(0.02, 0.97) for _ in range(count))
        return [Fault(chance.choice(targets), chance.choice([KILL, KILL, KILL, STOP]), at) for at in moments]

    return faults


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
    "soak": Row(_of_all_kinds(30), REFERENCE, steps=300),
}


def run(folder: Path, toys: SimpleNamespace, row: Row, faults: list[Fault]) -> Outcome:
    values = {**options(toys, toys.tied), "data.train": toys.data, "run_dir": folder / "run", **row.asks,
              "driver.num_steps": row.steps, "checkpoint.every": CHECKPOINT_EVERY}
    started_s, delays_s = time.monotonic(), []
    program, ready_s = _start(folder, values), 0.0
    try:
        for fault in faults:
            wanted = min(int(fault.at * row.steps), row.steps - 1)
            _wait_for_steps(program, folder / "run", wanted)
            ready_s = ready_s or time.monotonic() - started_s
            struck_s, done = time.monotonic(), len(metrics(folder / "run"))
            if not _strike(program, folder / "run", fault):
                continue
            if fault.target == DRIVER:
                program.process.wait(30)
                program.end_all()
                program = _start(folder, {**values, "resume": "auto"})
            _wait_for_steps(program, folder / "run", done, since_s=struck_s)
            delays_s.append(time.monotonic() - struck_s)
        code = program.end(deadline_s=DEADLINE_S)
    finally:
        program.end_all()
    sums = audit(folder / "run")
    return Outcome(code, time.monotonic() - started_s, ready_s, delays_s, "clean" if sums.is_clean else "NOT CLEAN",
                   _sha(folder / "run" / "model"), f"{len(sums.lost)} lost, {len(sums.twice)} twice")


def _start(folder: Path, values: dict[str, object]) -> Program:
    return Program([f"{key}={value}" for key, value in values.items()], folder=folder)


def _wait_for_steps(program: Program, run_dir: Path, number: int, *, since_s: float | None = None) -> None:
    """Until so many steps are done; `since_s`: and one was written after that moment."""
    file, wall_s = run_dir / "metrics.jsonl", time.time() - (time.monotonic() - (since_s or 0.0))
    deadline_s = time.monotonic() + DEADLINE_S
    while program.process.poll() is None and time.monotonic() < deadline_s:
        newer = since_s is None or (file.is_file() and file.stat().st_mtime > wall_s)
        if newer and len(metrics(run_dir)) >= number:
            return
        time.sleep(0.05)


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
        yield actor_of(run_dir / "logs" / f"{target}.log")


def _sha(model: Path) -> str:
    file = model / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else "no model"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of: {', '.join(ROWS)}")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if unknown := set(asked.rows) - set(ROWS):
        parser.error(f"no row {sorted(unknown)[0]!r}; there are: {', '.join(ROWS)}")
    undisturbed: dict[str, Outcome] = {}
    lines, failed = [], 0
    with tempfile.TemporaryDirectory(prefix="flux-ray-chaos-") as temporary:
        Path(temporary, "toys").mkdir()
        toys = make_toys(Path(temporary, "toys"))
        for name in asked.rows or ROWS:
            row = ROWS[name]
            faults = row.faults(random.Random(f"{name} {asked.seed}"))
            print(f"{name}: {', '.join(f'{f.signal.name} {f.target} at {f.at:.2f}' for f in faults)}", flush=True)
            kind = f"{row.asks} {row.steps}"
            if row.same_weights and kind not in undisturbed:
                undisturbed[kind] = run(Path(temporary, f"undisturbed {len(undisturbed)}"), toys, row, [])
            outcome = run(Path(temporary, name), toys, row, faults)
            same = outcome.weights == undisturbed[kind].weights if row.same_weights else None
            right = outcome.code == 0 and outcome.verdict == "clean" and same is not False
            failed += not right
            lines.append(_line(name, faults, outcome, same, right))
            print(lines[-1], flush=True)
    print("\n".join(["", *HEAD, *lines]))
    return int(bool(failed))


HEAD = ("| fault | times | exit | audit | weights | start, s | delay, s | |", "|---|---|---|---|---|---|---|---|")


def _line(name: str, faults: list[Fault], outcome: Outcome, same: bool | None, right: bool) -> str:
    weights = {True: "the same", False: "OTHERS", None: "-"}[same]
    delays = ", ".join(f"{delay_s:.0f}" for delay_s in outcome.delays_s)
    return (f"| {name} | {len(faults)} | {outcome.code} | {outcome.verdict}: {outcome.audited} | {weights} | "
            f"{outcome.ready_s:.0f} | {delays} | {'right' if right else 'WRONG'} |")


if __name__ == "__main__":
    sys.exit(main())
