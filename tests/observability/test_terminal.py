"""What a person sees of a run's steps."""

from __future__ import annotations

import io
import logging
import os

import pytest

from flux_ray.config import from_dict
from flux_ray.observability import terminal as module
from flux_ray.observability.callbacks import Callback
from flux_ray.observability.run_folder import RunFolder
from flux_ray.observability.terminal import Terminal
from flux_ray.run.recorder import Recorder

pytestmark = pytest.mark.unit


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only as the test says."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def steps_shown(clock, *, step_s: float, num_steps: int) -> list[int]:
    stream = io.StringIO()
    terminal = Terminal(stream, enabled=True)
    for step in range(1, num_steps + 1):
        terminal.step(step, num_steps, {"driver/step_s": step_s})
        clock[0] += step_s
    return [int(line.split("step ")[1].split("/")[0]) for line in stream.getvalue().splitlines()]


def test_every_step_of_a_second_or_more_is_shown(clock):
    assert steps_shown(clock, step_s=1.0, num_steps=4) == [1, 2, 3, 4]


def test_of_short_steps_one_a_second_the_first_and_the_last(clock):
    assert steps_shown(clock, step_s=0.25, num_steps=11) == [1, 5, 9, 11]


def test_the_log_has_every_step_and_what_is_said_is_never_left_out(clock, caplog):
    stream = io.StringIO()
    terminal = Terminal(stream, enabled=True)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for step in (1, 2, 3):
            terminal.step(step, 9, {"reward/mean": 0.5})
            terminal.say(f"said {step}")
    assert [f"said {step}" in stream.getvalue() for step in (1, 2, 3)] == [True] * 3
    assert [record.message for record in caplog.records if record.message.startswith("step")] == [
        f"step {step}/9  reward 0.500" for step in (1, 2, 3)]


def test_of_a_kind_that_may_come_often_one_a_second(clock, caplog):
    stream = io.StringIO()
    terminal = Terminal(stream, enabled=True)
    with caplog.at_level(logging.INFO, logger=module.__name__):
        for number in range(4):
            terminal.say_of("dropped", f"dropped {number}", level=logging.WARNING)
            terminal.say_of("other", f"other {number}")
            clock[0] += 0.5
    assert [line.split("] ")[1] for line in stream.getvalue().splitlines()] == [
        "dropped 0", "other 0", "dropped 2", "other 2"]
    assert sum(record.levelno == logging.WARNING for record in caplog.records) == 4 and len(caplog.records) == 8


def test_a_reader_that_goes_away_ends_no_run():
    reader, writer = os.pipe()
    os.close(reader)
    terminal = Terminal(os.fdopen(writer, "w", buffering=1), enabled=True)
    for _ in range(2):
        terminal.say("to nobody")


def test_a_silent_terminal_shows_nothing(clock):
    stream = io.StringIO()
    terminal = Terminal(stream, enabled=False)
    terminal.say("anything")
    terminal.step(1, 2, {})
    assert stream.getvalue() == ""


def test_what_a_callback_prints_is_shown(tmp_path, capsys):
    """It is a run's own output that goes to the log."""
    class Prints(Callback):
        def on_step(self, step, metrics):
            print("of step", step)

        def on_evaluation(self, step, metrics):
            print("of evaluation", step)

    with module.quiet(tmp_path / "run.log", progress=False) as terminal:
        folder = RunFolder(tmp_path)
        recorder = Recorder(from_dict({}), folder=folder, terminal=terminal, callbacks=[Prints()])
        print("a library's words")
        recorder.step(0, {"actor/loss": 1.0})
        recorder.evaluation(0, {"eval/task_mean": 1.0}, [])
    assert capsys.readouterr().out == "of step 0\nof evaluation 0\n"
    assert (tmp_path / "run.log").read_text().startswith("a library's words\n")
