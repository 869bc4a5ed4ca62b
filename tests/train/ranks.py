"""What training ranks do in the tests, and how they are started: one process per rank, as in a real run.

Takes:  a scenario's name, a world size, a folder with a model in `model/`.
Gives:  whatever the scenario's rank 0 wrote into the folder.
Never:  waits without a deadline, or leaves a process behind.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

DEADLINE_S = 240.0  # of one scenario: process starts and a dozen tiny engines
ROOT = Path(__file__).parents[2]


def launch(scenario: str, world_size: int, folder: Path, *, module: str = "scenarios") -> dict[str, Any]:
    """Run `scenario` of `module` on this many ranks; the JSON that rank 0 gave.

    A rank that fails is the error, with its log.
    """
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"tests.train.{module}", scenario, str(world_size), str(port), str(folder)]
    logs = [folder / f"{scenario}-{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(subprocess.Popen([*command, str(rank)], cwd=ROOT, env=env, stdout=file, stderr=file))
    try:
        for process in processes:
            process.wait(DEADLINE_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, f"{log.name}: exit {process.returncode}\n{log.read_text()[-3000:]}"
    return json.loads((folder / f"{scenario}.json").read_text())


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def relative_gap(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """‖g - g′‖ / ‖g‖ over all parameters together."""
    assert got.keys() == wanted.keys()
    gap = sum(float(np.square(got[k].astype(np.float64) - wanted[k]).sum()) for k in wanted)
    return (gap / sum(float(np.square(wanted[k].astype(np.float64)).sum()) for k in wanted)) ** 0.5
