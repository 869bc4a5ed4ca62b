"""A run of which Ray's own server dies, and that a scheduler ends: it goes on, saves, and leaves nothing."""

from __future__ import annotations

import os
import signal

import pytest

from flux_ray import FluxConfig, FluxTrainer, checkpoints
from flux_ray.audit import audit
from tests.system.program import actor_of, metrics
from tests.system.small_run import assert_same_weights

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

CHECKPOINT_EVERY = 6
RANK_DIES_AT, RAY_DIES_AT, IS_ENDED_AT = 8, 20, 32  # steps that are done; test_ranks_start_again has a rank's death too
END_DEADLINE_S = 45  # where Ray's processes got the signal too, the driver would wait a minute for them
CANARY = "canary-4711"


@pytest.mark.parametrize("rank_dies", [False, pytest.param(True, marks=pytest.mark.all)])
def test_it_goes_on_after_rays_own_server_until_it_is_ended(kept, toys, tmp_path, start, rank_dies):
    """From its last checkpoint each time, to the weights of a run that nothing disturbed. SIGTERM goes to the whole
    process group, as schedulers send it. Neither secrets nor temporary files stay."""
    asked = {"model.path": str(toys.untied), "data.train": str(toys.data), "batch.prompts_per_step": 8,
             "train.num_ranks": 2, "train.learning_rate": 1e-3}
    run_dir, temporary = tmp_path / "run", tmp_path / "temporary"
    temporary.mkdir()
    more = {"algo": "sft", "run_dir": run_dir, "driver.num_steps": 1_000_000, "checkpoint.every": CHECKPOINT_EVERY,
            "cluster.env.X_KEY": CANARY}
    program = start(*(f"{key}={value}" for key, value in {**asked, **more}.items()), folder=tmp_path,
                    HF_TOKEN=CANARY, WANDB_API_KEY=CANARY, TMPDIR=str(temporary))
    if rank_dies:
        program.wait_for_steps(RANK_DIES_AT, run_dir=run_dir)
        actor_of(run_dir / "logs" / "trainer-1.log").send_signal(signal.SIGKILL)
        program.wait_for(r"trainer 1 died .*: going on from step \d+")
    program.wait_for_steps(RAY_DIES_AT, run_dir=run_dir)
    program.named("gcs_server").send_signal(signal.SIGKILL)
    program.wait_for(r"Ray's gcs_server \(process \d+\) died: going on from step \d+")
    program.wait_for_steps(IS_ENDED_AT, run_dir=run_dir)
    os.killpg(program.process.pid, signal.SIGTERM)
    assert program.end(deadline_s=END_DEADLINE_S) == 128 + signal.SIGTERM, program.shown
    steps = len(metrics(run_dir))
    saved = run_dir / "checkpoints" / f"step-{steps:06d}"
    assert program.shown.splitlines()[-1] == (
        f"flux-ray: interrupted: step {steps} is saved in {saved}; go on with resume={run_dir}")
    assert "Traceback" not in program.shown
    assert audit(run_dir).is_clean
    assert list(temporary.glob("flux_ray-*")) == []
    assert_is_kept_secret(program.shown, run_dir)

    with kept():
        config = FluxConfig(algorithm="sft", **asked, run_dir=str(tmp_path / "undisturbed"))
        undisturbed = FluxTrainer(config).fit(num_steps=steps)
    assert_same_weights(checkpoints.export(saved, tmp_path / "exported"), undisturbed.model_path)


def assert_is_kept_secret(shown, run_dir):
    """Neither in what a run writes, its checkpoints and logs too, nor on the terminal."""
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 8 and run_dir / "config.yaml" in written
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in shown
