"""The live display in a terminal of its own: at two widths, of a run that fails, where the cursor can't move."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios

import pytest

from flux_ray.observability.live import BLOCKS, sparkline
from tests.house.source import REPO

pytestmark = pytest.mark.unit

NUM_STEPS = 8
PROGRAM = """
import sys, time
from pathlib import Path
from flux_ray.observability.terminal import quiet
try:
    with quiet(Path(sys.argv[1]), progress=True) as terminal:
        terminal.say("ready")
        for step in range(1, 9):
            print("a library's noise")
            terminal.time_went(step, "62 % generation tail, engine 1")
            terminal.step(step, 8, {"reward/mean": step / 8, "actor/grpo_kl": 0.0125, "actor/entropy": 2.0 - step / 8,
                                    "rollout/response_length_mean": 100.0, "rollout/truncated_frac": 0.25,
                                    "rollout/tokens_per_s": 1234.0, "driver/step_s": 4.2})
            if step == 2:
                terminal.say("warning: look out")
                with terminal.shown():
                    print("of a callback")
            if step == 4 and sys.argv[2] == "fails":
                raise RuntimeError("engine 0 died")
except RuntimeError as error:
    print(f"flux-ray: the run failed: {error}", file=sys.stderr)
"""
MOVE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])")


def screen(written: str) -> list[str]:
    """What stands on a terminal after that was written: text, cursor up, erase a line."""
    rows, row, column, i = [""], 0, 0, 0
    while i < len(written):
        if move := MOVE.match(written, i):
            i = move.end()
            if move[2] == "A":
                row = max(0, row - int(move[1] or 1))
            elif move[2] == "K":
                rows[row] = "" if move[1] == "2" else rows[row][:column]
            continue
        letter, i = written[i], i + 1
        if letter == "\r":
            column = 0
        elif letter == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        else:
            rows[row] = rows[row].ljust(column)[:column] + letter + rows[row][column + 1:]
            column += 1
    return [line.rstrip() for line in rows]


def in_a_terminal(tmp_path, how: str, *, columns: int, term: str = "xterm-256color") -> str:
    """All that the program wrote to a terminal of so many columns."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, "-c", PROGRAM, str(tmp_path / "run.log"), how],
                  {**os.environ, "TERM": term, "PYTHONPATH": str(REPO)})
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written = b""
    while True:
        try:
            more = os.read(terminal, 65536)
        except OSError:   # the other end is closed
            more = b""
        if not more:
            break
        written += more
    os.close(terminal)
    os.waitpid(pid, 0)
    return written.decode()


@pytest.mark.parametrize("columns", [60, 120])
def test_the_last_picture_of_a_run(tmp_path, columns):
    written = in_a_terminal(tmp_path, "ends", columns=columns)
    lines = screen(written)
    text = "\n".join(lines)
    picture = lines[next(i for i, line in enumerate(lines) if "━" in line):]
    assert max(map(len, picture)) <= columns
    assert f"step {NUM_STEPS}/{NUM_STEPS}" in picture[0] and "all steps are done" in picture[0]
    spaced = " ".join(text.split())
    for shown in (f"reward 1.000 {BLOCKS}", "kl 0.0125 ▁", f"entropy 1.000 {BLOCKS[::-1]}", "length 100.0 ▁",
                  "truncated 25.0% ▁", "tokens/s 1234 ▁", "last step 4.20 s: 62 % generation tail, engine 1"):
        assert shown in spaced, text
    assert [line.split("] ")[-1] for line in lines[:3]] == ["ready", "warning: look out", "of a callback"]
    assert text.count("last step") == 1 and "noise" not in text   # drawn anew in its place
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")   # the cursor is shown again
    log = (tmp_path / "run.log").read_text()
    assert log.count("a library's noise") == NUM_STEPS == log.count("tok/s 1234")


def test_a_failure_is_told_below_the_last_picture(tmp_path):
    lines = screen(in_a_terminal(tmp_path, "fails", columns=80))
    last = [line for line in lines if line][-2:]
    assert last == ["last step 4.20 s: 62 % generation tail, engine 1", "flux-ray: the run failed: engine 0 died"]


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(tmp_path):
    written = in_a_terminal(tmp_path, "ends", columns=80, term="dumb")
    assert "\x1b" not in written and "step 8/8  reward 1.000" in written


def test_a_trend_of_more_values_than_columns_and_of_what_is_not_finite():
    assert sparkline([float(i) for i in range(800)], 8) == BLOCKS
    assert sparkline([0.0, float("nan"), 1.0, float("inf")], 8) == BLOCKS[0] + BLOCKS[-1]
    assert sparkline([float("nan")], 8) == ""
