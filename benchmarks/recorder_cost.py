"""What watching a run costs the driver: CPU milliseconds of a step, for what a recorder does with it.

`python -m benchmarks.recorder_cost [--monitors tensorboard,...] [--steps 200]`: steps with as many metrics as a run of
GRPO has, and a time line, go through a run's own Recorder: files alone; with a live display; with monitors and a trace
of each step too. What rollouts on disk cost is benchmarks.rollouts_cost.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from flux_ray.config import from_dict
from flux_ray.observability.run_folder import RunFolder
from flux_ray.observability.spans import DRIVER, Span
from flux_ray.observability.terminal import Terminal
from flux_ray.run.recorder import Recorder

NUM_METRICS = 90
GROUPS = 64
STEP_S = 0.2  # between two steps: the live display draws by the clock


class Screen(io.StringIO):
    """A terminal that nobody looks at."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


def spans(step: int) -> list[Span]:
    whole = [Span("wait for groups", DRIVER, step, step + 0.6), Span("train", "trainer", step + 0.6, step + 0.9)]
    return [*whole, *(Span("generate", f"engine {i % 8}", step, step + 0.5, {"uid": i}) for i in range(GROUPS))]


def cpu_ms(folder: Path, *, steps: int, live: bool, **observability: Any) -> float:
    """Of a step, on average."""
    config = from_dict({"run_dir": str(folder), "driver.num_steps": steps + 1,
                        **{f"observability.{name}": value for name, value in observability.items()}})
    run = RunFolder(folder)
    run.create(config, resume_step=None)
    recorder = Recorder(config, folder=run, terminal=Terminal(Screen(), enabled=live))
    metrics = {f"section/metric_{i}": 0.1 * i for i in range(NUM_METRICS)} | {"reward/mean": 0.5}
    used_s = 0.0
    for step in range(steps + 1):
        time.sleep(STEP_S if live else 0.0)
        start_s = time.process_time()
        recorder.step(step, metrics | {"reward/mean": step / steps})
        recorder.time_went(step, spans(step))
        if step:  # the first imports what it needs
            used_s += time.process_time() - start_s
    recorder.terminal.close()
    return 1000 * used_s / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--monitors", default="tensorboard", help="which are on together, with commas between")
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    os.environ["TERM"] = "xterm"  # one that can move its cursor
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = {
            "files_ms": cpu_ms(place / "files", steps=asked.steps, live=False),
            "live_ms": cpu_ms(place / "live", steps=asked.steps, live=True),
            "all_ms": cpu_ms(place / "all", steps=asked.steps, live=True, monitors=asked.monitors.split(","),
                             trace_steps=list(range(asked.steps + 1))),
        }
    print(json.dumps({"metrics": NUM_METRICS, "groups": GROUPS, "monitors": asked.monitors,
                      **{name: round(value, 2) for name, value in found.items()}}))


if __name__ == "__main__":
    main()
