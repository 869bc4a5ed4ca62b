"""How training ranks are started in the tests: one process per rank, as in a real run.

Takes:  scenarios' names, a world size, a folder with the models that they train.
Gives:  what rank 0 wrote for each scenario; `relative_gap` of two gradients.
Never:  waits without a deadline, or leaves a process behind.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

DEADLINE_S = 540.0  # of one world size: process starts and some dozens of tiny engines
ROOT = Path(__file__).parents[2]


def launch(scenarios: Sequence[str], world_size: int, folder: Path) -> dict[str, dict[str, Any]]:
    """Run the scenarios one after the other on this many ranks; the JSON that rank 0 gave for each.

    A rank that fails is the error, with its log.
    """
    port = free_port()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.train.rank_process", str(world_size), str(port), str(folder)]
    logs = [folder / f"rank-{rank}-of-{world_size}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(subprocess.Popen([*command, str(rank), *scenarios], cwd=ROOT, env=env, stdout=file,
                                              stderr=file))
    try:
        for process in processes:
            process.wait(DEADLINE_S)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, log in zip(processes, logs, strict=True):
        assert process.returncode == 0, f"{log.name}: exit {process.returncode}\n{log.read_text()[-3000:]}"
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in scenarios}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def relative_gap(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """‖g - g′‖ / ‖g‖ over all parameters together."""
    assert got.keys() == wanted.keys()
    gap = sum(float(np.square(got[k].astype(np.float64) - wanted[k]).sum()) for k in wanted)
    return (gap / sum(float(np.square(wanted[k].astype(np.float64)).sum()) for k in wanted)) ** 0.5
