"""Runs that are ended from outside, or by what they are given: told in one line, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from flux_ray.audit import audit
from tests.system.program import GONE_DEADLINE_S, actor_of, living, metrics, open_to_others, sessions_of
from tests.system.small_run import MAX_GAP, assert_moved, options

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


def test_a_run_goes_on_after_a_rank_and_after_rays_own_server(toys, tmp_path, start):
    """From its last checkpoint, to the weights of one that nothing disturbed, whose secrets and temporary files don't
    stay."""
    asked = ("driver.num_steps=160", "checkpoint.every=20")
    canary, temporary = "canary-4711", tmp_path / "temporary"
    temporary.mkdir()
    undisturbed = start(*supervised(toys, tmp_path / "undisturbed", *asked, f"cluster.env.X_KEY={canary}"),
                        folder=tmp_path / "one", HF_TOKEN=canary, WANDB_API_KEY=canary, TMPDIR=str(temporary))
    assert undisturbed.end(deadline_s=END_DEADLINE_S) == 0, undisturbed.shown
    assert_is_kept_secret(canary, undisturbed, tmp_path / "undisturbed")
    assert list(temporary.glob("flux_ray-*")) == []
    run_dir = tmp_path / "run"
    program = start(*supervised(toys, run_dir, *asked), folder=tmp_path / "other")
    program.wait_for_steps(30, run_dir=run_dir)
    actor_of(run_dir / "logs" / "trainer-1.log").send_signal(signal.SIGKILL)
    program.wait_for(r"trainer 1 died .*: going on from step \d*0")
    program.wait_for_steps(70, run_dir=run_dir)
    program.named("gcs_server").send_signal(signal.SIGKILL)
    assert program.end(deadline_s=END_DEADLINE_S) == 0, program.shown
    assert re.search(r"Ray's gcs_server \(process \d+\) died: going on from step \d*0", program.shown)
    assert_same(run_dir, tmp_path / "undisturbed")


def assert_is_kept_secret(canary, program, run_dir):
    """Neither in what a run writes, its checkpoints and logs too, nor on the terminal."""
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert len(written) > 8 and run_dir / "config.yaml" in written
    assert [path for path in written if canary.encode() in path.read_bytes()] == []
    assert canary not in program.shown


def assert_same(run_dir, undisturbed):
    assert audit(run_dir).is_clean
    stored = [load_file(folder / "model" / "model.safetensors") for folder in (run_dir, undisturbed)]
    assert stored[0].keys() == stored[1].keys()
    assert all(stored[0][name].equal(stored[1][name]) for name in stored[0])


def logs_of(program):
    """(process, the file that it writes to as its standard output)"""
    return [(process.pid, Path(os.readlink(f"/proc/{process.pid}/fd/1"))) for process in program.processes()]


@pytest.mark.parametrize("when", ["3 steps", "run folder"])
def test_sigterm_to_the_driver(toys, tmp_path, start, when):
    """While it trains, to the whole process group, as schedulers do it; or while Ray starts, to the driver alone.

    The step that it was in is saved.
    """
    program = start(*supervised(toys, tmp_path / "run", "driver.num_steps=1000000"), folder=tmp_path)
    if when == "3 steps":
        program.wait_for_steps(3, run_dir=tmp_path / "run")
    else:
        program.wait_for(when)
    time.sleep(0.5)
    if when == "3 steps":
        os.killpg(program.process.pid, signal.SIGTERM)
    else:
        program.process.send_signal(signal.SIGTERM)
    # Where Ray's processes get the signal too, the driver waits a minute for them.
    line, steps = last_line(program, 143, deadline_s=45), len(metrics(tmp_path / "run"))
    if when == "3 steps":
        saved = tmp_path / "run" / "checkpoints" / f"step-{steps:06d}"
        assert line == (f"flux-ray: interrupted: step {steps} is saved in {saved}; go on with "
                        f"resume={tmp_path / 'run'}")
        assert (saved / "driver.json").is_file()
    else:
        assert line == "flux-ray: interrupted: no step was done"


@pytest.mark.all  # tests/run/test_stopping.py shows it on a process without actors
def test_a_second_signal_ends_it_at_once(toys, tmp_path, start):
    """Its processes too; SIGHUP is the first, as of a terminal that closes."""
    program = start(*supervised(toys, tmp_path / "run", "driver.num_steps=1000000"), folder=tmp_path)
    program.wait_for_steps(3, run_dir=tmp_path / "run")
    for number in (signal.SIGHUP, signal.SIGTERM):
        os.killpg(program.process.pid, number)
    assert last_line(program, 143, deadline_s=15) == "flux-ray: ended at once by a second signal"


def test_a_driver_that_is_killed_leaves_no_process(toys, tmp_path, start):
    """SIGKILL: it can tell nobody, neither its actors nor the process that vLLM started in one of them. Temporary files
    and semaphores go too. Until then it listens on this machine alone, and engine and trainer agree on a model whose
    head is not its embedding."""
    run_dir = tmp_path / "run"
    values = options(toys, toys.untied) | {
        "data.train": toys.data, "run_dir": run_dir, "driver.num_steps": 1_000_000, "checkpoint.every": 8,
        "cluster.env.VLLM_ENABLE_V1_MULTIPROCESSING": "'1'"}
    program = start(*(f"{key}={value}" for key, value in values.items()), folder=tmp_path)
    program.wait_for_steps(9, run_dir=run_dir)
    assert program.named("EngineCore").is_running()
    sessions = sessions_of(program.processes())
    assert open_to_others(sessions) == []
    temporary = Path(actor_of(run_dir / "logs" / "engine-0.log").environ()["TMPDIR"])
    assert temporary.is_dir() and _semaphores(temporary)
    program.process.send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    assert program.end(deadline_s=END_DEADLINE_S) == -signal.SIGKILL
    while (left := living(sessions)) and time.monotonic() < killed_s + GONE_DEADLINE_S:
        time.sleep(0.1)
    assert left == []
    assert not temporary.exists() and not _semaphores(temporary)
    assert max(line["weights/logprob_gap_max"] for line in metrics(run_dir)) <= MAX_GAP
    stored = load_file(run_dir / "checkpoints" / "step-000008" / "trainer" / "model.safetensors")
    assert_moved(toys.untied, {name.removeprefix("master."): tensor for name, tensor in stored.items()})


def _semaphores(temporary):
    """Those of the processes whose temporary files lie there."""
    return list(Path("/dev/shm").glob(f"sem.{temporary.name}-*"))


@pytest.mark.parametrize("when", [pytest.param("run folder", marks=pytest.mark.all), "starting"])
def test_ctrl_c_while_it_starts(toys, tmp_path, start, when):
    program = start(*supervised(toys, tmp_path / "run"), "algo=grpo", "reward.functions=[numeric]", "data.max_rows=8",
                    "rollout.max_tokens=8", folder=tmp_path)
    program.wait_for(when)
    time.sleep(0.5)
    program.interrupt()
    assert last_line(program, 130) == "flux-ray: interrupted: no step was done"
