"""An engine that dies, or stands still, costs time and nothing else."""

from __future__ import annotations

import signal

import pytest

from flux_ray import FluxConfig, FluxTrainer
from flux_ray.cluster.plan import ENGINE
from tests.system.kept import KeptCluster
from tests.system.program import actor_of, metrics, numbers
from tests.system.small_run import assert_same, options

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

#: After which steps, by what. One that stands still takes another engine's start; test_rollout_workers shows how any
#: actor is found that does.
DIES, DIES_AND_HANGS = {1: signal.SIGKILL}, {1: signal.SIGKILL, 5: signal.SIGSTOP}


@pytest.mark.parametrize("strikes", [DIES, pytest.param(DIES_AND_HANGS, marks=pytest.mark.all)],
                         ids=["dies", "dies and hangs"])
def test_a_run_goes_on_without_its_engine_until_another_stands_there(kept, toys, tmp_path, whole, strikes):
    run_dir, struck = tmp_path / "run", []

    def on_step(step, _):
        if step in strikes:
            engine = actor_of(KeptCluster.log_of(ENGINE))
            engine.send_signal(strikes[step])
            struck.append(engine.pid)

    values = options(toys, toys.tied) | {"rollout.max_model_len": 64}
    with kept():
        FluxTrainer(FluxConfig(algorithm="grpo", **values, run_dir=str(run_dir))).fit(
            str(toys.data), callbacks=[on_step])
    assert len(set(struck)) == len(strikes)
    assert (run_dir / "run.log").read_text().count("another one is started in its place") == len(strikes)
    assert numbers(metrics(run_dir)) == numbers(metrics(whole))
    assert_same(run_dir, whole)
