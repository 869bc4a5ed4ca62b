"""Runs that are ended from outside, or by what they are given: told in one line, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

END_DEADLINE_S = 240   # beside other tests on two cores


def supervised(toys, run_dir, *more: str) -> list[str]:
    """The run that starts fastest: no engine."""
    return ["algo=sft", f"model.path={toys.untied}", f"data.train={toys.data}", "batch.prompts_per_step=8",
            "train.num_ranks=2", "train.learning_rate=1e-3", f"run_dir={run_dir}", *more]


def last_line(program, exit_code: int, *, deadline_s: float = END_DEADLINE_S) -> str:
    """The last line of a run that ended with that code and without a traceback."""
    assert program.end(deadline_s=deadline_s) == exit_code, program.shown
    assert "Traceback" not in program.shown, program.shown
    return program.shown.splitlines()[-1]


@pytest.mark.all
def test_a_trainer_rank_that_is_killed_ends_a_run_that_is_not_to_go_on(toys, tmp_path, start):
    """Rank 0 fails too, as its peer is gone; the run names the rank that died, and where its log is."""
    program = start(*supervised(toys, tmp_path / "run", "driver.num_steps=1000000", "cluster.max_restarts=0"),
                    folder=tmp_path)
    program.wait_for_steps(3, run_dir=tmp_path / "run")
    rank_1 = {file: pid for pid, file in logs_of(program)}[tmp_path / "run" / "logs" / "trainer-1.log"]
    psutil.Process(rank_1).send_signal(signal.SIGKILL)
    line = last_line(program, 1)
    assert line.startswith("flux-ray: the run failed: trainer 1 died"), line
    assert line.endswith(f"(log: {tmp_path}/run/logs/trainer-1.log)"), line


def logs_of(program):
    """(process, the file that it writes to as its standard output)"""
    return [(process.pid, Path(os.readlink(f"/proc/{process.pid}/fd/1"))) for process in program.processes()]


@pytest.mark.all  # test_ctrl_c_while_it_starts shows it for another signal
def test_sigterm_to_the_driver_while_ray_starts(toys, tmp_path, start):
    program = start(*supervised(toys, tmp_path / "run", "driver.num_steps=1000000"), folder=tmp_path)
    program.wait_for("run folder")
    time.sleep(0.5)
    program.process.send_signal(signal.SIGTERM)
    assert last_line(program, 143) == "flux-ray: interrupted: no step was done"


@pytest.mark.all  # tests/run/test_stopping.py shows it on a process without actors
def test_a_second_signal_ends_it_at_once(toys, tmp_path, start):
    """Its processes too; SIGHUP is the first, as of a terminal that closes."""
    program = start(*supervised(toys, tmp_path / "run", "driver.num_steps=1000000"), folder=tmp_path)
    program.wait_for_steps(3, run_dir=tmp_path / "run")
    for number in (signal.SIGHUP, signal.SIGTERM):
        os.killpg(program.process.pid, number)
    assert last_line(program, 143, deadline_s=15) == "flux-ray: ended at once by a second signal"


@pytest.mark.parametrize("when", [pytest.param("run folder", marks=pytest.mark.all), "starting"])
def test_ctrl_c_while_it_starts(toys, tmp_path, start, when):
    program = start(*supervised(toys, tmp_path / "run"), "algo=grpo", "reward.functions=[numeric]", "data.max_rows=8",
                    "rollout.max_tokens=8", folder=tmp_path)
    program.wait_for(when)
    time.sleep(0.5)
    program.interrupt()
    assert last_line(program, 130) == "flux-ray: interrupted: no step was done"
