"""A rollout worker that dies and users' rollouts that block, exit or hang cost time and nothing else."""

from __future__ import annotations

import hashlib
import signal
import threading
from pathlib import Path

import psutil
import pytest

from flux_ray import FluxConfig, FluxTrainer
from tests.system.kept import KeptCluster
from tests.system.program import actor_of, metrics, numbers
from tests.system.small_run import options

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

STRIKE_AFTER_STEPS = {1: signal.SIGKILL, 4: signal.SIGSTOP}

ROLLOUTS = '''
"""single_turn, with trouble: each kind once."""
import os
import time
from pathlib import Path

from flux_ray.rollout.functions import single_turn

TROUBLE = Path(__file__).parent / "trouble"


def once(name):
    try:
        (TROUBLE / name).touch(exist_ok=False)
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
    with (TROUBLE / "times").open("a") as times:
        times.write(f"{prompt.uid} {began_s} {time.monotonic()}\\n")
    return trajectories
'''


def run(kept, toys, folder: Path, *, on_step=None, **more) -> Path:
    """The folder of the run that `whole` is, on one engine."""
    values = options(toys, toys.tied) | more
    with kept():
        FluxTrainer(FluxConfig(algorithm="grpo", **values, run_dir=str(folder / "run"))).fit(
            str(toys.data), callbacks=[on_step] if on_step else [])
    return folder / "run"


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "model" / "model.safetensors").read_bytes()).hexdigest()


def test_a_rollout_worker_that_dies_or_stands_still_changes_no_bit(kept, toys, tmp_path, whole):
    """A moment into the steps that follow."""
    struck = []

    def strike(number):
        worker = actor_of(KeptCluster.log_of("rollout"))
        worker.send_signal(number)
        struck.append(worker.pid)

    def on_step(step, metrics):
        if step + 1 in STRIKE_AFTER_STEPS:
            threading.Timer(0.2, strike, [STRIKE_AFTER_STEPS[step + 1]]).start()

    disturbed = run(kept, toys, tmp_path, on_step=on_step)
    assert len(set(struck)) == len(STRIKE_AFTER_STEPS)
    assert not any(psutil.pid_exists(pid) for pid in struck)
    assert numbers(metrics(disturbed)) == numbers(metrics(whole))
    assert weights(disturbed) == weights(whole)


def test_rollouts_that_exit_hang_or_block_once_are_trained_on_after_all(kept, toys, tmp_path, whole):
    (tmp_path / "rollouts.py").write_text(ROLLOUTS)
    (tmp_path / "trouble").mkdir()
    troubled = run(kept, toys, tmp_path, **{"rollout.function": f"{tmp_path}/rollouts.py:troubled",
                                            "rollout.deadline_s": 12.0})
    assert sorted(path.name for path in (tmp_path / "trouble").iterdir()) == ["blocks", "exits", "hangs", "times"]
    assert numbers(metrics(troubled)) == numbers(metrics(whole))
    assert weights(troubled) == weights(whole)
    times = [line.split() for line in (tmp_path / "trouble" / "times").read_text().splitlines()]
    spans = {int(uid): (float(began_s), float(ended_s)) for uid, began_s, ended_s in times}
    began_s, ended_s = spans.pop(25)
    beside = [end_s for other_s, end_s in spans.values() if began_s - 1 < other_s < began_s + 1]
    assert ended_s > began_s + 5 and len(beside) >= 3, spans
    assert max(beside) < began_s + 5, "a group that blocks delays no other"
