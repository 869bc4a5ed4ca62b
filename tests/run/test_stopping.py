"""A run that is asked to end: what is saved first, and what is given up. Signals to processes of their own."""

from __future__ import annotations

import asyncio
import io
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from flux_ray.accounts import Account
from flux_ray.config import from_dict
from flux_ray.observability.run_folder import METRICS, RunFolder, read_lines
from flux_ray.observability.terminal import Terminal
from flux_ray.records import LoopState
from flux_ray.run import checkpoint
from flux_ray.run.recorder import Recorder
from flux_ray.run.stopping import Stopped, Stopping, told
from flux_ray.run.training import Training
from flux_ray.signals import Interrupted
from tests.house.source import REPO

pytestmark = pytest.mark.unit


class Steps:
    """A loop whose steps wait for samples, and then change the weights for a while."""

    def __init__(self, *, waits_s: float, trains_s: float, evaluates_s: float = 0.0) -> None:
        self.step, self.is_settled = 0, True
        self._waits_s, self._trains_s, self._evaluates_s = waits_s, trains_s, evaluates_s

    async def keep(self, state: LoopState, folder: Path) -> LoopState:
        return state

    @property
    def state(self) -> LoopState:
        return LoopState(self.step, 8 * self.step)

    async def begin(self, tasks: asyncio.TaskGroup) -> None: ...

    def go_on(self) -> None: ...

    async def train(self) -> dict[str, float]:
        self.is_settled = True
        await asyncio.sleep(self._waits_s)
        self.is_settled = False
        await asyncio.sleep(self._trains_s)
        self.step += 1
        return {}

    def account(self) -> Account:
        return Account(8 * self.step)

    async def evaluate(self) -> None:
        if self.step:
            await asyncio.sleep(self._evaluates_s)

    def timeline(self) -> list[Any]:
        return []

    async def samples(self, count: int) -> list[Any]:
        return []

    def end(self) -> None: ...


async def stopped(folder: Path, loop: Steps, *, after_s: float, **options: object) -> None:
    """Asked to end after that time."""
    config = from_dict({"algo.name": "sft", "driver.num_steps": 1000, **options})
    run_folder = RunFolder(folder)
    run_folder.create(config, resume_step=None)
    recorder = Recorder(config, folder=run_folder, terminal=Terminal(io.StringIO(), enabled=False))
    task = asyncio.current_task()
    assert task is not None
    stopping = Stopping(task)
    asyncio.get_running_loop().call_later(after_s, stopping.ask)
    with pytest.raises(BaseExceptionGroup) as raised:
        await Training(config, loop, recorder, trained=[], progress=lambda: None, stopping=stopping).run()
    assert isinstance(raised.value.exceptions[0], Stopped), raised.value


def saved(folder: Path) -> list[int]:
    return [checkpoint.load(path).step for path in checkpoint.whole(folder / "checkpoints")]


async def test_a_step_that_waits_is_given_up_and_the_last_whole_one_saved(tmp_path):
    loop = Steps(waits_s=0.05, trains_s=0.05)
    asyncio.get_running_loop().call_later(0.5, lambda: setattr(loop, "_waits_s", 3600.0))
    await stopped(tmp_path, loop, after_s=1.0)
    assert loop.step > 0 and saved(tmp_path) == [loop.step]
    assert [line["step"] for line in read_lines(tmp_path / METRICS)] == list(range(loop.step))


async def test_a_step_that_changes_the_weights_is_finished(tmp_path):
    loop = Steps(waits_s=0.0, trains_s=0.5)
    await stopped(tmp_path, loop, after_s=0.2)
    assert loop.step == 1 and saved(tmp_path) == [1]


async def test_a_step_that_hangs_is_given_up_and_nothing_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr("flux_ray.run.training.STEP_S", 0.3)
    loop = Steps(waits_s=0.0, trains_s=3600.0)
    await stopped(tmp_path, loop, after_s=0.1)
    assert loop.step == 0 and saved(tmp_path) == []


async def test_an_evaluation_is_given_up_and_its_step_saved(tmp_path):
    loop = Steps(waits_s=0.0, trains_s=0.0, evaluates_s=3600.0)
    await stopped(tmp_path, loop, after_s=0.5, **{"eval.every": 3})
    assert loop.step == 3 and saved(tmp_path) == [3]


async def test_nothing_is_saved_twice_or_where_the_config_says_no(tmp_path):
    loop = Steps(waits_s=0.0, trains_s=0.3)
    await stopped(tmp_path / "a", loop, after_s=0.1, **{"checkpoint.every": 1})
    assert saved(tmp_path / "a") == [1]
    loop = Steps(waits_s=0.0, trains_s=0.3)
    await stopped(tmp_path / "b", loop, after_s=0.1, **{"checkpoint.on_stop": False})
    assert saved(tmp_path / "b") == []


async def test_what_does_not_end_by_itself_is_cancelled():
    async def life() -> None:
        task = asyncio.current_task()
        assert task is not None
        stopping = Stopping(task)
        with stopping.within(0.1):
            stopping.ask()
            await asyncio.sleep(3600)

    with pytest.raises(asyncio.CancelledError):
        await asyncio.create_task(life())


def test_the_last_line_tells_what_was_saved(tmp_path):
    error = Interrupted(signal.SIGTERM)
    assert error.exit_code == 143
    assert str(told(error, tmp_path, begun=0, done=0)) == "interrupted: no step was done"
    assert str(told(error, tmp_path, begun=2, done=4)) == "interrupted: nothing was saved since step 2"
    folder = checkpoint.checkpoint_folder(tmp_path, 3)
    folder.mkdir()
    checkpoint.save(folder, LoopState(3))
    line = told(error, tmp_path, begun=0, done=5)
    assert line.exit_code == 143
    assert str(line) == (f"interrupted: step 3 is saved in {folder}, nothing of the 2 steps since; go on with "
                         f"resume={tmp_path.parent}")


PROGRAM = """
import sys, time
from flux_ray import signals
def wait():
    print("ready", flush=True)
    for _ in range(400):  # a signal that comes just before a sleep is seen after it
        time.sleep(0.05)
def work():
    with signals.asks(lambda: print("asked", flush=True), kill=lambda: print("killed", flush=True)):
        wait()
with signals.taken(leave=sys.argv[1] == "leave"):
    try:
        work() if sys.argv[2] == "asks" else wait()
    except KeyboardInterrupt as error:
        print(error.exit_code, error, flush=True)
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, cwd=REPO)
    assert program.stdout is not None and program.stdout.readline() == "ready\n"
    return program


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_nobody_is_asked_about_is_raised(number):
    program = started("leave", "alone")
    program.send_signal(number)
    out, _ = program.communicate(timeout=30)
    assert out == f"{128 + number} interrupted\n"


def test_the_second_signal_ends_a_program_at_once_with_a_line():
    program = started("leave", "asks")
    program.send_signal(signal.SIGTERM)
    assert program.stdout is not None and program.stdout.readline() == "asked\n"
    program.send_signal(signal.SIGINT)
    out, err = program.communicate(timeout=15)
    assert out == "killed\n" and err == "flux-ray: ended at once by a second signal\n"
    assert program.returncode == 130


def test_the_second_signal_is_raised_in_a_program_of_the_users():
    program = started("stay", "asks")
    for number in (signal.SIGINT, signal.SIGTERM):
        program.send_signal(number)
        time.sleep(0.5)
    out, _ = program.communicate(timeout=15)
    assert out == "asked\nkilled\n143 ended at once by a second signal\n"
