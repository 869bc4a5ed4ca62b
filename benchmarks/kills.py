"""A synchronous run whose rollout worker is killed at random moments, beside one that nothing disturbs.

python -m benchmarks.kills [--kills 10] [--steps 30]

It tells whether metrics and final weights are the same, bit for bit; then the exit code is 0.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.system.conftest import make_toys
from tests.system.program import Program, actor_of, metrics, numbers
from tests.system.small_run import options
from tests.system.test_rollout_workers import weights

MOST_APART_S = 1.5  # from one kill to the next, once another worker stands there: a step takes about a second


def run(folder: Path, toys, *, num_steps: int, kills: int) -> Path:
    values = {**options(toys, toys.tied), "data.train": toys.data, "run_dir": folder / "run",
              "driver.num_steps": num_steps}
    program = Program([f"{key}={value}" for key, value in values.items()], folder=folder)
    moments = random.Random(0)
    try:
        for kill in range(kills):
            program.wait_for_steps(min(num_steps - 1, kill * num_steps // max(kills, 1)), run_dir=folder / "run")
            time.sleep(moments.uniform(0.0, MOST_APART_S))
            worker = actor_of(folder / "run" / "logs" / "rollout-0.log")
            worker.send_signal(signal.SIGKILL)
            psutil.wait_procs([worker], timeout=10)
            print(f"killed after {len(metrics(folder / 'run'))} steps", flush=True)
        if program.end():
            raise RuntimeError(program.shown)
    finally:
        program.end_all()
    return folder / "run"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        toys = make_toys(Path(temporary))
        undisturbed, killed = (run(Path(temporary, name), toys, num_steps=asked.steps, kills=kills)
                               for name, kills in (("undisturbed", 0), ("killed", asked.kills)))
        same = {"metrics": numbers(metrics(undisturbed)) == numbers(metrics(killed)),
                "weights": weights(undisturbed) == weights(killed)}
    print(json.dumps({"name": "kills", "value": asked.kills, "same": same}))
    return int(not all(same.values()))


if __name__ == "__main__":
    sys.exit(main())
