"""Training ranks that are lost start again from the last checkpoint; all other actors stay."""

from __future__ import annotations

import re
import signal

import psutil
import pytest

from flux_ray import FluxConfig, FluxTrainer
from flux_ray.cluster.plan import ENGINE, REWARD, ROLLOUT, TRAINER
from tests.system.kept import KeptCluster
from tests.system.program import actor_of, metrics, numbers
from tests.system.small_run import assert_same, options

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

KILL_AFTER_STEP, CHECKPOINT_EVERY = 6, 4


def test_a_rank_that_is_killed_costs_time_and_no_bit(kept, toys, tmp_path, whole):
    """Rank 0, which sends the weights: its place at the end of the weight channel is taken by the new one."""
    run_dir, killed, stay = tmp_path / "run", [], {}

    def on_step(step, _):
        if step == KILL_AFTER_STEP and not killed:
            stay.update({role: actor_of(KeptCluster.log_of(role)).pid for role in (ENGINE, ROLLOUT, REWARD)})
            rank = actor_of(run_dir / "logs" / "trainer-0.log")
            rank.send_signal(signal.SIGKILL)
            killed.append(rank.pid)

    values = options(toys, toys.tied) | {"checkpoint.every": CHECKPOINT_EVERY}
    with kept(anew=[TRAINER]):
        FluxTrainer(FluxConfig(algorithm="grpo", **values, run_dir=str(run_dir))).fit(
            str(toys.data), callbacks=[on_step])
    log = (run_dir / "run.log").read_text()
    assert re.search(r"trainer 0 died .*: going on from step 4", log)
    assert "starting 2 trainer on cpu; the other actors go on" in log
    assert {role: actor_of(KeptCluster.log_of(role)).pid for role in stay} == stay
    assert not any(psutil.pid_exists(pid) for pid in killed)
    assert numbers(metrics(run_dir)) == numbers(metrics(whole))
    assert_same(run_dir, whole)
    versions = [line["driver/version"] for line in metrics(run_dir)]
    assert versions == sorted(set(versions)), "a version goes back"
