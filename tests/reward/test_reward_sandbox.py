"""Users' rewards run as in a script: in the main thread of a process of their own, in their folder, by any import."""

from __future__ import annotations

import asyncio
import functools
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from flux_ray.config import Config, RewardConfig, from_dict
from flux_ray.errors import UserError
from flux_ray.plugins import hand_over
from flux_ray.reward import RewardWorker, Surroundings, ask_signatures, resolve_functions
from flux_ray.reward.values import RewardError
from tests.reward.test_reward_worker import make_group, responses_to

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]


def written(folder: Path, **files: str) -> Path:
    """`pkg__rewards` is the file pkg/rewards.py, `pkg__INIT` its __init__.py."""
    for name, code in files.items():
        path = folder / f"{name.replace('__', '/').replace('INIT', '__init__')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(code))
    return folder


def rewards_of(reference: str, texts=("42", "41"), columns=None, surroundings=None, **options) -> list[float]:
    """Of a group of these texts, as a run asks: the functions are looked at first, then a worker scores."""
    config = from_dict({"reward.functions": [reference], **options})
    group = make_group(list(texts), columns=columns)
    resolve_functions(config.reward, config.data, set(group.prompt.columns), ask_signatures(config))

    async def score() -> list[float]:
        worker = RewardWorker(config, surroundings)
        try:
            return (await worker.score(responses_to(group))).rewards.tolist()
        finally:
            worker.close()

    return asyncio.run(score())


SCRIPT_LIKE = {
    "a timer of its own, as math-verify sets one": """
        import signal
        def graded(completions, **columns):
            def late(number, frame):
                raise TimeoutError
            signal.signal(signal.SIGALRM, late)
            values = []
            for completion in completions:
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                try:
                    while completion != "42":
                        pass
                    values.append(1.0)
                except TimeoutError:
                    values.append(0.0)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            return values
    """,
    "a pool of processes, spawned": """
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor
        def right(completion):
            return float(completion == "42")
        def graded(completions, **columns):
            with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
                return list(pool.map(right, completions))
    """,
    "a pool of processes, of the method it chose": """
        import multiprocessing
        multiprocessing.set_start_method("fork")
        def right(completion):
            return float(completion == "42")
        def graded(completions, **columns):
            with multiprocessing.Pool(2) as pool:
                return pool.map(right, completions)
    """,
    "an event loop": """
        import asyncio
        async def right(completion):
            await asyncio.sleep(0.001)
            return float(completion == "42")
        async def all_of_them(completions):
            return await asyncio.gather(*map(right, completions))
        def graded(completions, **columns):
            return asyncio.run(all_of_them(completions))
    """,
    "a loop's signal handler, and a client kept between calls": """
        import asyncio, signal
        CLIENT = []
        async def graded(completions, **columns):
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR1, print)
            CLIENT.append(loop)
            assert all(one is loop for one in CLIENT)
            return [float(completion == "42") for completion in completions]
    """,
    "a folder of its own": """
        import os, tempfile
        os.chdir(tempfile.mkdtemp())
        def graded(completions, **columns):
            os.chdir("/")
            return [float(completion == "42" and os.getcwd() == "/") for completion in completions]
    """,
    "much that is printed": """
        import subprocess
        print("at import")
        def graded(completions, **columns):
            print("x" * 100_000)
            subprocess.run(["echo", "from a command"], check=True)
            return [float(completion == "42") for completion in completions]
    """,
    "threads, a fork, and warnings as errors": """
        import os, threading
        def graded(completions, **columns):
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)
            values = []
            thread = threading.Thread(target=lambda: values.extend(float(c == "42") for c in completions))
            thread.start()
            thread.join()
            return values
    """,
    "a command by its output, with a time limit": """
        import subprocess, sys
        def graded(completions, **columns):
            code = "print(6 * 7)"
            out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30).stdout
            return [float(completion == out.strip()) for completion in completions]
    """,
    "NumPy's values": """
        import numpy as np
        def graded(completions, **columns):
            return np.array([completion == "42" for completion in completions], np.float32)
    """,
}


@pytest.mark.parametrize("what", SCRIPT_LIKE)
def test_a_reward_runs_as_in_a_script(tmp_path, what):
    here = os.getcwd()
    file = written(tmp_path, mine=SCRIPT_LIKE[what]) / "mine.py"
    assert rewards_of(f"{file}:graded") == [1.0, 0.0]
    assert os.getcwd() == here


@pytest.mark.parametrize("package", [True, False], ids=["package", "folder"])
def test_a_file_of_a_package_imports_its_neighbours(tmp_path, package):
    code = "from .helpers import right\nfrom .deep.more import one\ndef graded(completions, **columns):\n" \
           "    return [one() * right(c) for c in completions]\n"
    folder = written(tmp_path, pack_a__rewards=code, pack_a__helpers="def right(c): return float(c == '42')\n",
                     pack_a__deep__more="from ..helpers import right\ndef one(): return right('42')\n")
    if package:
        written(folder, pack_a__INIT="", pack_a__deep__INIT="")
    assert rewards_of(f"{folder}/pack_a/rewards.py:graded") == [1.0, 0.0]


def test_a_module_beneath_the_folder_is_found_by_name(tmp_path):
    """With the command, which isn't in that folder, and whatever folder the workers are in."""
    written(tmp_path, pack_b__rewards="from pack_b.helpers import right\ndef graded(completions, **columns):\n"
                                      "    return [right(c) for c in completions]\n",
            pack_b__helpers="def right(c): return float(c == '42')\n", pack_b__INIT="")
    code = ("from flux_ray.run.prepare import _absolute\nfrom flux_ray.config import from_dict\n"
            "print(*_absolute(from_dict({'reward.functions': ['pack_b.rewards:graded']})).reward.functions)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [f"{tmp_path}/pack_b/rewards.py:graded"], done.stderr
    assert rewards_of(done.stdout.strip()) == [1.0, 0.0]


def test_a_script_of_a_package_names_its_functions(tmp_path):
    """`python -m pack_c.train`, where the function stands in the script itself."""
    written(tmp_path, pack_c__INIT="", pack_c__helpers="def right(c): return float(c == '42')\n",
            pack_c__train="from .helpers import right\nfrom flux_ray.api import name_of\n"
                          "def graded(completions, **columns):\n    return [right(c) for c in completions]\n"
                          "if __name__ == '__main__':\n    print(name_of(graded))\n")
    done = subprocess.run([sys.executable, "-m", "pack_c.train"], cwd=tmp_path, capture_output=True, text=True,
                          timeout=60)
    assert rewards_of(done.stdout.strip()) == [1.0, 0.0], done.stderr


def test_the_exit_code_of_a_process_is_told_as_it_was_each_time(tmp_path):
    """Two threads may look at its end at the same moment: of one, the code was lost now and then."""
    file = written(tmp_path, mine="import os\nos._exit(3)\ndef graded(completions): ...") / "mine.py"
    for _ in range(40):
        with pytest.raises(UserError, match=r"exited with 3$"):
            ask_signatures(from_dict({"reward.functions": [f"{file}:graded"]}))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(3)\ndef graded(completions): ...", "line 2 failed: SystemExit: 3"),
        ("import os\nos._exit(3)\ndef graded(completions): ...",
         "while they were imported, the process in which it ran exited with 3"),
        ("class graded:\n    def __call__(self, completions): ...", "is a class: name a function, or an instance"),
        ("def graded(completions, /, **columns): ...", "'completions' can be given by its place alone"),
        ("from graded import nothing", "line 1 failed: ModuleNotFoundError: No module named 'graded'"),
        ("from .none import nothing", "line 1 failed: ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_called_is_refused_at_start_with_its_place(tmp_path, code, message):
    file = written(tmp_path, mine=code) / "mine.py"
    with pytest.raises(UserError) as refused:
        ask_signatures(from_dict({"reward.functions": [f"{file}:graded"]}))
    assert message in str(refused.value) and str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_a_reward_that_exits_fails_by_name_and_the_next_call_is_answered(tmp_path):
    code = "import os, sys\ndef graded(completions, **columns):\n    if completions == ['41']:\n        os._exit(3)\n" \
           "    if completions == ['40']:\n        sys.exit(4)\n    return [1.0 for _ in completions]\n"
    config = from_dict({"reward.functions": [f"{written(tmp_path, mine=code)}/mine.py:graded"]})

    async def all_three():
        worker = RewardWorker(config)
        try:
            scoring = [worker.score(responses_to(make_group([text], uid=int(text)))) for text in ("41", "42", "40")]
            return await asyncio.gather(*scoring, return_exceptions=True)
        finally:
            worker.close()

    ended, scores, exited = asyncio.run(all_three())
    assert isinstance(ended, RewardError)
    assert str(ended).endswith("ChildEnded: the process in which it ran exited with 3"), ended
    assert scores.rewards.tolist() == [1.0]
    assert isinstance(exited, RewardError) and str(exited).endswith("sample 1 of 1: SystemExit: 4")


def test_a_closure_reaches_the_process_that_calls_it():
    """What it holds comes along; async ones, and objects that can be called, do as well."""
    right = {"42": 1.0}

    def graded(completions, **columns):
        return [right.get(completion, 0.0) for completion in completions]

    async def judged(completions, **columns):
        return graded(completions)

    for function in (graded, judged, functools.partial(graded, unused=1)):
        assert rewards_of(hand_over(function)) == [1.0, 0.0]
    lock = threading.Lock()
    with pytest.raises(UserError, match=r"given:lambda: the function can't be given to other processes.*thread"):
        rewards_of(hand_over(lambda completions: [float(lock.locked())]))


COLUMNS = "def graded(completions, completion, prompt=None, **columns):\n" \
          "    assert 'prompt' not in columns and prompt == ['p'] * 2\n" \
          "    return [float(c == right) for c, right in zip(completions, completion)]\n"


def test_a_function_gets_the_columns_that_it_names_whatever_they_are_called(tmp_path):
    file = written(tmp_path, mine=COLUMNS) / "mine.py"
    assert rewards_of(f"{file}:graded", columns={"completion": "42", "prompt": "p"}) == [1.0, 0.0]


def test_rewards_see_the_folder_and_the_variables_they_are_given(tmp_path, monkeypatch):
    code = "import os\nKEY = os.environ['JUDGE_KEY']\ndef graded(completions, **columns):\n" \
           "    return [float(KEY == 'secret' and open('right.txt').read() == c) for c in completions]\n"
    file = written(tmp_path, mine=code) / "mine.py"
    (tmp_path / "right.txt").write_text("42")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"reward\.env: the environment has no variable 'JUDGE_KEY'"):
        Surroundings.here(RewardConfig(env=["JUDGE_KEY"]))
    monkeypatch.setenv("JUDGE_KEY", "secret")
    config = from_dict({"reward.env": ["JUDGE_KEY"]})
    surroundings = Surroundings.here(config.reward)
    assert "secret" not in repr(surroundings) and surroundings.folder == str(tmp_path)
    assert rewards_of(f"{file}:graded", surroundings=surroundings, **{"reward.env": ["JUDGE_KEY"]}) == [1.0, 0.0]


def test_the_rule_by_math_verify_has_a_main_thread():
    pytest.importorskip("math_verify", reason="math-verify isn't installed")
    config = from_dict({"reward.functions": ["math"]})
    columns = {"answer": ["\\sqrt{8}", "7"]}
    assert rewards_of("math", ["7", "42"], columns=columns) == [1.0, 0.0]
    assert isinstance(config, Config)
