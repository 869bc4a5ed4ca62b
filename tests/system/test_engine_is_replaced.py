"""An engine that dies, or stands still, costs time and nothing else."""

from __future__ import annotations

import signal

import pytest

from tests.faults.test_faults import assert_same
from tests.system.program import actor_of
from tests.system.small_run import options

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

END_DEADLINE_S = 240


def test_a_run_goes_on_without_its_engine_until_another_stands_there(toys, tmp_path, start, whole):
    """Once it is killed, once it stands still."""
    run_dir = tmp_path / "run"
    values = options(toys, toys.tied) | {"data.train": toys.data, "run_dir": run_dir}
    program = start(*(f"{key}={value}" for key, value in values.items()), folder=tmp_path)
    for steps, number in ((2, signal.SIGKILL), (6, signal.SIGSTOP)):
        program.wait_for_steps(steps, run_dir=run_dir)
        actor_of(run_dir / "logs" / "engine-0.log").send_signal(number)
        program.wait_for("another one is started in its place")
    assert program.end(deadline_s=END_DEADLINE_S) == 0, program.shown
    assert_same(run_dir, whole)
