"""Whatever a reward does, it ends its own sample alone: the others keep their rewards, and nothing of it is left."""

from __future__ import annotations

import asyncio
import logging
import os
import textwrap
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from flux_ray.config import from_dict
from flux_ray.errors import UserError
from flux_ray.records import FAILED, Prompt, Responses, Scores
from flux_ray.reward import RewardWorker
from flux_ray.reward.budget import LAST, Budget
from flux_ray.reward.environment import HARMLESS
from flux_ray.reward.values import RewardError

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

TEXTS = ("42", "1", "41", "40")  # the second one is guilty

PREAMBLE = """
import ctypes, math, os, re, subprocess, sys, tempfile, time
from pathlib import Path
HELD = []

def bad():
{bad}

def graded(completions, **columns):
    values = []
    for completion in completions:
        values.append(bad() if completion == "1" else float(completion))
    return values
"""


def written(folder: Path, bad: str) -> str:
    file = folder / "mine.py"
    file.write_text(PREAMBLE.format(bad=textwrap.indent(textwrap.dedent(bad).strip(), "    ")))
    return f"{file}:graded"


def responses(texts: tuple[str, ...]) -> Responses:
    size = len(texts)
    row = Prompt(9, 4, "12+30=", np.arange(3, dtype=np.int32), {"answer": "42"}, size, 1)
    ids = (np.arange(6, dtype=np.int32),) * size
    return Responses(row, texts, ids, (3,) * size, ("stop",) * size, np.full(size, 3), 3)


def scored(reference: str, *groups: tuple[str, ...], **options: object) -> list[Scores]:
    given = {"reward.functions": [reference], "reward.on_failure": "drop", "reward.deadline_s": 1.0, **options}
    config = from_dict(given)

    async def score() -> list[Scores]:
        worker = RewardWorker(config)
        try:
            return [await worker.score(responses(texts)) for texts in groups]
        finally:
            worker.close()

    return asyncio.run(score())


FAILS = {
    "raises": "raise ValueError('no')",
    "gives infinity": "return math.inf",
    "gives a text": "return 'good'",
    "exits": "sys.exit(3)",
    "ends its process": "os._exit(3)",
    "breaks its process": "ctypes.string_at(0)",
    "loops": "while True: pass",
    "sleeps": "time.sleep(60)",
    "starts processes": """
        for _ in range(200):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
        time.sleep(60)
    """,
    "takes memory": "return float(len(bytearray(8 << 30)))",
    "keeps the interpreter's lock": "return float(bool(re.match(r'(a+)+$', 'a' * 40 + 'b')))",
    "opens files": """
        HELD.extend(open(f"{number}", "w") for number in range(2000))
        return 1.0
    """,
    "writes a file that is too large": """
        with open("large", "wb") as file:
            for _ in range(64):
                file.write(bytes(1 << 20))
        return 1.0
    """,
}
LIMITS = {"reward.processes": 16, "reward.memory_gib": 1.0, "reward.open_files": 512, "reward.file_gib": 1 / 32}


@pytest.mark.parametrize("what", FAILS)
def test_a_reward_that_fails_ends_its_own_sample_alone(tmp_path, what):
    before = set(psutil.pids())
    (first, second) = scored(written(tmp_path, FAILS[what]), TEXTS, ("42", "7"), **LIMITS)
    np.testing.assert_array_equal(first.rewards, [42, np.nan, 41, 40])
    np.testing.assert_array_equal(first.task_rewards, first.rewards)
    assert first.parts[FAILED].tolist() == [0, 1, 0, 0]
    assert second.rewards.tolist() == [42, 7] and FAILED not in second.parts
    assert nothing_left(before, str(tmp_path))


def nothing_left(before: set[int], folder: str) -> bool:
    """No process of the file's is there for long."""
    for _ in range(50):
        if not any(one.pid not in before and folder in " ".join(one.cmdline()) for one in processes()):
            return True
        time.sleep(0.1)
    return False


def processes():
    for process in psutil.Process().children(recursive=True):
        if process.status() != psutil.STATUS_ZOMBIE:
            yield process


@pytest.mark.parametrize("value", ["None", "math.nan"])
def test_no_value_is_invalid_and_is_said_once(tmp_path, value, caplog):
    with caplog.at_level(logging.WARNING):
        scores = scored(written(tmp_path, f"return {value}"), TEXTS, TEXTS)
    for one in scores:
        np.testing.assert_array_equal(one.rewards, [42, np.nan, 41, 40])
        assert FAILED not in one.parts, "it is no error"
    assert sum("no function gave a reward for 1 of 4 samples" in record.message for record in caplog.records) == 1


HARMLESS_ONES = {
    "prints much": """
        for _ in range(100):
            print("x" * (1 << 20))
        return 1.0
    """,
    "leaves its folder": "os.chdir('/')\nreturn 1.0",
    "empties its environment": "os.environ.clear()\nreturn 1.0",
    "makes files": """
        for number in range(2000):
            Path(f"{number}").touch()
        return 1.0
    """,
}
WATCHED = """
WHERE, VARIABLES = os.getcwd(), dict(os.environ)
def watched(completions, **columns):
    values = graded(completions, **columns)
    assert "2" not in completions or (os.getcwd(), dict(os.environ)) == (WHERE, VARIABLES)
    return values
"""


@pytest.mark.parametrize("what", HARMLESS_ONES)
def test_what_a_call_does_to_its_process_reaches_no_other_call(tmp_path, what, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = written(tmp_path, HARMLESS_ONES[what])
    file = Path(reference.partition(":")[0])
    file.write_text(file.read_text() + WATCHED)
    first, second = scored(f"{file}:watched", TEXTS, ("42", "2"), **{"reward.output_kib": 4, "reward.deadline_s": 20.0})
    assert first.rewards.tolist() == [42, 1, 41, 40] and second.rewards.tolist() == [42, 2]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "__pycache__") == ["mine.py"]
    assert 0 <= capfd.readouterr().out.count("x") <= 2 * 4096


def test_cpu_time_is_limited(tmp_path):
    (scores,) = scored(written(tmp_path, "while True: pass"), TEXTS, **{"reward.cpu_s": 1.0, "reward.deadline_s": 60.0})
    np.testing.assert_array_equal(scores.rewards, [42, np.nan, 41, 40])


def test_a_daemon_that_left_its_session_ends_with_its_call(tmp_path):
    bad = f"""
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
                time.sleep(60)
            os._exit(0)
        time.sleep(60)
    """
    scored(written(tmp_path, bad), TEXTS)
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError("it lives")


def test_secrets_do_not_reach_rewards(tmp_path, monkeypatch):
    secret = {"WANDB_API_KEY", "HF_TOKEN", "RAY_AUTH_TOKEN", "MY_OWN", "HF_HUB_TOKEN"}
    for name in (*secret, "OMP_NUM_THREADS", "ASKED_KEY"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy")
    seen = tmp_path / "seen"
    bad = f"Path({str(seen)!r}).write_text(' '.join(os.environ))\nreturn 1.0"
    scored(written(tmp_path, bad), TEXTS, **{"reward.env": ["ASKED_KEY"]})
    names = set(seen.read_text().split())
    assert {"OMP_NUM_THREADS", "ASKED_KEY", "PATH", "TMPDIR"} <= names and "PATH" in HARMLESS
    assert not names & {*secret, "HTTPS_PROXY"}


def test_its_folder_has_the_files_of_the_other_and_is_gone_with_it(tmp_path, monkeypatch):
    (tmp_path / "right.txt").write_text("42")
    monkeypatch.chdir(tmp_path)
    bad = f"Path({str(tmp_path / 'where')!r}).write_text(os.getcwd() + ' ' + tempfile.gettempdir())\n" \
          "Path('new').touch()\nreturn float(open('right.txt').read())"
    (scores,) = scored(written(tmp_path, bad), TEXTS)
    assert scores.rewards.tolist() == [42, 42, 41, 40]
    folder, temporary = (tmp_path / "where").read_text().split()
    assert folder == temporary != str(tmp_path) and not (tmp_path / "new").exists()
    for _ in range(50):
        if not os.path.exists(folder):
            return
        time.sleep(0.1)
    raise AssertionError(f"{folder} is left")


def test_too_few_rewards_drop_the_group_and_a_retry_may_help(tmp_path):
    with pytest.raises(RewardError, match="sample 2 of 2: ValueError: no"):
        scored(written(tmp_path, "raise ValueError('no')"), ("42", "1"))
    count = tmp_path / "count"
    bad = f"""
        with open({str(count)!r}, "a") as file:
            file.write("x")
        if os.path.getsize({str(count)!r}) < 3:
            raise ValueError("not yet")
        return 5.0
    """
    reference = written(tmp_path, bad)
    (scores,) = scored(reference, TEXTS, **{"reward.retries": 2, "reward.on_failure": "stop"})
    assert scores.rewards.tolist() == [42, 5, 41, 40]
    count.unlink()
    with pytest.raises(RewardError, match="sample 2 of 4: ValueError: not yet"):
        scored(reference, TEXTS, **{"reward.on_failure": "stop"})


@pytest.mark.unit
def test_too_many_failures_stop_the_run():
    budget = Budget(0.5)
    for _ in range(LAST // 2):
        budget.count(2, failed=1, why="a")
    with pytest.raises(UserError, match=r"52% of the last 100 .*reward\.max_error_share=0\.5.* the last one: b"):
        budget.count(4, failed=4, why="b")
    few = Budget(0.5)
    few.count(LAST - 1, failed=LAST - 1, why="too few to tell")
    never = Budget(1.0)
    never.count(LAST, failed=LAST, why="as it likes")
