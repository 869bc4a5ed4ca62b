"""The share of a real run's CPU time that goes into attesting weights: `python -m benchmarks.attest_in_run`.

Takes:  how many tokens a response has (--tokens), how many steps are measured (--steps).
Gives:  a line of JSON: CPU seconds a step of all processes of the run, those of the checksums and comparisons in the
        trainer and in the engine, and their share.
Knows:  the checks are timed where they run, on their own thread's clock: in a rank by a plugin of the run, in vLLM's
        own process, which loads no plugins of ours, by the worker's class. The step is that of the other figures
        (work.py): 29M parameters, 64 responses.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.work import Phase, equal, make_data, make_model, options
from flux_ray import FluxConfig
from flux_ray.api import to_yaml
from flux_ray.weights.attest import Receipts
from flux_ray.weights.worker import AttestingWorker
from tests.system.program import Program

WARM_UP = 2  # steps
PLUGIN = "from benchmarks.attest_in_run import time_checks\ntime_checks({folder!r})\n"
START_S = 400.0
CHECKS_FOLDER = "CHECKS_FOLDER"  # a variable of an engine's processes


def time_checks(folder: str) -> None:
    """In each process of the run: what its checks take is added up in a file."""
    process = Path(os.readlink("/proc/self/fd/1")).stem
    if process.startswith("trainer-"):
        from flux_ray.weights import checksum

        _timed(checksum, ("checksum",), Path(folder, process))
    elif process.startswith("engine-"):
        from flux_ray.rollout import engine

        engine.WORKER_EXTENSION = f"{__name__}.{TimedWorker.__name__}"
        os.environ[CHECKS_FOLDER] = folder


def _timed(owner: Any, names: tuple[str, ...], file: Path) -> None:
    for name in names:
        setattr(owner, name, _counted(getattr(owner, name), file))


def _counted(function: Callable[..., Any], file: Path) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        start_s = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            with file.open("a") as lines:
                lines.write(f"{time.thread_time() - start_s}\n")

    return counted


class TimedWorker(AttestingWorker):
    """The class of vLLM's workers whose checks are timed."""


if CHECKS_FOLDER in os.environ:  # this is vLLM's own process, or the actor around it
    _timed(Receipts, ("begin", "expect", "take", "read_ahead", "wrong"),
           Path(os.environ[CHECKS_FOLDER], Path(os.readlink("/proc/self/fd/1")).stem))


def checks_s(folder: Path) -> dict[str, float]:
    """Process ► CPU seconds of its checks so far."""
    return {file.name: sum(map(float, file.read_text().split())) for file in sorted(folder.iterdir())}


def all_s(program: Program) -> dict[int, float]:
    """Process ► its CPU seconds so far."""
    found = {}
    for process in program.processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = times.user + times.system
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=4)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        phase = Phase("equal", equal(asked.tokens), WARM_UP, asked.steps + 1)
        make_model(folder / "29M", "29M")
        make_data(folder / "data.jsonl", [phase])
        (folder / "checks").mkdir()
        (folder / "plugin.py").write_text(PLUGIN.format(folder=str(folder / "checks")))
        values = options(folder, dtype="float32", phases=[phase]) | {
            "data.train": str(folder / "data.jsonl"), "run_dir": str(folder / "run"),
            "plugins": [str(folder / "plugin.py")]}
        to_yaml(FluxConfig(algorithm="grpo", **values), folder / "run.yaml")
        program = Program(["--config", str(folder / "run.yaml")], folder=folder)
        try:
            program.wait_for_steps(WARM_UP, run_dir=folder / "run", deadline_s=START_S)
            all_before, checks_before = all_s(program), checks_s(folder / "checks")
            program.wait_for_steps(WARM_UP + asked.steps, run_dir=folder / "run", deadline_s=START_S)
            all_after, checks_after = all_s(program), checks_s(folder / "checks")
        finally:
            program.end_all()
    step_s = sum(spent_s - all_before.get(pid, 0.0) for pid, spent_s in all_after.items()) / asked.steps
    each = {name: (spent_s - checks_before.get(name, 0.0)) / asked.steps for name, spent_s in checks_after.items()}
    print(json.dumps({"tokens": asked.tokens, "steps": asked.steps, "step_cpu_s": round(step_s, 3),
                      **{f"{name}_s": round(spent_s, 4) for name, spent_s in each.items()},
                      "share": round(sum(each.values()) / step_s, 5)}))


if __name__ == "__main__":
    main()
