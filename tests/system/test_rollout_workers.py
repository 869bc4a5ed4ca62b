"""A rollout worker that dies and users' rollouts that block, exit or hang cost time and nothing else."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.system.program import metrics, numbers
from tests.system.test_run import options

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

NUM_STEPS = 8
KILL_AFTER_STEPS = (1, 4)

ROLLOUTS = '''
"""single_turn, with trouble: each kind once, and only where FOLDER is given."""
import os
import time
from pathlib import Path

from flux_ray.rollout.functions import single_turn


def once(name):
    folder = os.environ.get("TROUBLE")
    if not folder:
        return False
    try:
        Path(folder, name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def troubled(prompt, generate):
    began_s = time.monotonic()
    if prompt.uid == 9 and once("exits"):
        os._exit(3)
    if prompt.uid == 17 and once("hangs"):
        time.sleep(3600)
    if prompt.uid == 25 and once("blocks"):
        time.sleep(5)
    trajectories = await single_turn(prompt, generate)
    if folder := os.environ.get("TROUBLE"):
        with Path(folder, "times").open("a") as times:
            times.write(f"{prompt.uid} {began_s} {time.monotonic()}\\n")
    return trajectories
'''


def run(start, toys, folder: Path, *more: str, kills: tuple[int, ...] = ()) -> Path:
    """The run's folder. After so many steps each the rollout worker is killed."""
    values = {**options(toys, toys.tied), "data.train": toys.data, "run_dir": folder / "run",
              "driver.num_steps": NUM_STEPS, "rollout.num_engines": 1}
    program = start(*(f"{key}={value}" for key, value in values.items()), *more, folder=folder)
    for steps in kills:
        program.wait_for_steps(steps, run_dir=folder / "run")
        time.sleep(0.2)
        worker = worker_of(program, folder / "run")
        worker.send_signal(signal.SIGKILL)
        psutil.wait_procs([worker], timeout=10)
    assert program.end() == 0, program.shown
    return folder / "run"


def worker_of(program, run_dir: Path) -> psutil.Process:
    """The process that writes to the rollout worker's log and is a Ray actor, once it is there."""
    for _ in range(600):
        for process in program.processes():
            try:
                is_it = os.readlink(f"/proc/{process.pid}/fd/1") == str(run_dir / "logs" / "rollout-0.log")
                if is_it and "ray::" in " ".join(process.cmdline()):
                    return process
            except OSError:
                continue
        time.sleep(0.1)
    raise AssertionError("no rollout worker")


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(toys, tmp_path_factory):
    from tests.system.program import Program

    started = []

    def start(*arguments, folder):
        started.append(Program(list(arguments), folder=folder))
        return started[-1]

    try:
        yield run(start, toys, tmp_path_factory.mktemp("undisturbed"))
    finally:
        for program in started:
            program.end_all()


def test_a_rollout_worker_that_is_killed_changes_no_bit(toys, tmp_path, start, undisturbed):
    killed = run(start, toys, tmp_path, kills=KILL_AFTER_STEPS)
    assert numbers(metrics(killed)) == numbers(metrics(undisturbed))
    assert weights(killed) == weights(undisturbed)


def test_rollouts_that_exit_hang_or_block_once_are_trained_on_after_all(toys, tmp_path, start, undisturbed):
    (tmp_path / "rollouts.py").write_text(ROLLOUTS)
    (tmp_path / "trouble").mkdir()
    troubled = run(start, toys, tmp_path, f"rollout.function={tmp_path}/rollouts.py:troubled",
                   f"cluster.env.TROUBLE={tmp_path}/trouble", "rollout.deadline_s=20", "rollout.max_model_len=64")
    assert sorted(path.name for path in (tmp_path / "trouble").iterdir()) == ["blocks", "exits", "hangs", "times"]
    assert numbers(metrics(troubled)) == numbers(metrics(undisturbed))
    assert weights(troubled) == weights(undisturbed)
    times = [line.split() for line in (tmp_path / "trouble" / "times").read_text().splitlines()]
    spans = {int(uid): (float(began_s), float(ended_s)) for uid, began_s, ended_s in times}
    began_s, ended_s = spans.pop(25)
    beside = [end_s for other_s, end_s in spans.values() if began_s - 1 < other_s < began_s + 1]
    assert ended_s > began_s + 5 and len(beside) >= 3, spans
    assert max(beside) < began_s + 5, "a group that blocks delays no other"
