"""The head of a cluster that others started dies: the run ends soon, says why, and its last commit is whole."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil
import pytest

from flux_ray.audit import audit
from flux_ray.run import checkpoint as saved
from tests.system.small_run import options

pytestmark = [pytest.mark.system, pytest.mark.all, pytest.mark.timeout(300)]

DIES_AT = 3
NOTICED_S, ENDED_S = 15.0, 15.0


def actors_of(run_dir: Path) -> list[int]:
    """Processes whose output goes to one of the run's logs."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if Path(os.readlink(f"/proc/{process.pid}/fd/1")).parent == run_dir / "logs":
                found.append(process.pid)
    return found


def test_a_run_whose_head_dies_ends_with_the_cause(toys, tmp_path, start):
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    head = {"num_cpus": 6, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        values = {**options(toys, toys.tied), "data.train": toys.data, "driver.num_steps": 1000, "checkpoint.every": 2,
                  "cluster.address": cluster.address, "cluster.allow_open": True, "run_dir": tmp_path / "run"}
        program = start(*(f"{key}={value}" for key, value in values.items()), folder=tmp_path)
        program.wait_for_steps(DIES_AT, run_dir=tmp_path / "run")
        cluster.head_node.all_processes["gcs_server"][0].process.kill()
        died_s = time.monotonic()
        assert program.end(deadline_s=120) == 1, program.shown
        print(f"ended {time.monotonic() - died_s:.0f} s after the death of Ray's server")
        while (left := actors_of(tmp_path / "run")) and time.monotonic() < died_s + NOTICED_S + ENDED_S:
            time.sleep(0.2)
        assert time.monotonic() - died_s < NOTICED_S + ENDED_S, program.shown
        assert not left, "actors stay"
    finally:
        cluster.shutdown()
    assert "Ray's server at " in program.shown.splitlines()[-1], program.shown
    assert audit(tmp_path / "run").is_clean
    whole, passed_over = saved.newest_whole(tmp_path / "run" / "checkpoints")
    assert whole is not None and not passed_over
