"""Models, data and a reward that the whole-system tests share; every program that a test starts ends with it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import pytest

from flux_ray import FluxConfig, FluxTrainer
from tests.system.kept import KeptCluster, kept_processes
from tests.system.program import REPO, Program
from tests.system.small_run import NUM_STEPS, options
from tests.tiny import tiny_gpt2, tiny_model

REWARDS = '''
"""Rewards that tests name by this file."""
import os
import re
import time


def digits(completions, **columns):
    """Share of digits: what a random model can learn within a few steps."""
    return [sum(c.isdigit() for c in text) / 16 for text in completions]


def breaks(completions, prompts, trainer_state, **columns):
    if trainer_state.global_step == 2 and "7+" in prompts[0]:
        raise KeyError("no such thing")
    return digits(completions)


def troubled(completions, prompts, trainer_state, **columns):
    """Some prompts of a step hang or raise; of another, end the process; of a third, block it with the GIL held."""
    step, last_digit = trainer_state.global_step, int(prompts[0].split("+")[0]) % 10
    if step == 2 and last_digit in (3, 8):
        raise KeyError("no such thing")
    if step == 2 and last_digit in (0, 5):
        time.sleep(3600)
    if step == 4 and last_digit in (1, 6):
        os._exit(3)
    if step == 6 and last_digit in (2, 7):
        re.fullmatch("(a+)+", "a" * 60 + "b")   # takes for ever, and no other thread runs meanwhile
    return digits(completions)
'''


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> SimpleNamespace:
    return make_toys(tmp_path_factory.mktemp("toys"))


def make_toys(folder: Path) -> SimpleNamespace:
    """Three tiny models (tied and untied embeddings, GPT-2), 40 prompts and a file of rewards."""
    for name, tied in (("tied", True), ("untied", False)):
        tiny_model(folder / name, tied=tied, context=64)
    tiny_gpt2(folder / "gpt2")
    rows = [{"prompt": f"{i}+{i + 1}=", "answer": str(2 * i + 1), "completion": str(2 * i + 1)} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(REWARDS)
    return SimpleNamespace(tied=folder / "tied", untied=folder / "untied", gpt2=folder / "gpt2",
                           data=folder / "data.jsonl", rewards=folder / "rewards.py")


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    """Program(...), ended with the test whatever becomes of it."""
    started: list[Program] = []

    def make(*arguments: str, folder: Path, **options) -> Program:
        started.append(Program(list(arguments), folder=folder, **options))
        return started[-1]

    yield make
    for program in started:
        program.end_all()


@pytest.fixture(scope="session")
def plugin(tmp_path_factory) -> Path:
    """The algorithm of the documentation's own page, as a file."""
    page = (REPO / "docs" / "algorithm.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(# my_algo\.py\n.*?)```", page, re.DOTALL)
    file = tmp_path_factory.mktemp("plugin") / "my_algo.py"
    file.write_text(block)
    return file


@pytest.fixture(scope="package")
def whole(toys, plugin, tmp_path_factory) -> Iterator[Path]:
    """The folder of an uninterrupted run from Python: tied embeddings, temperature 1, two engines, two ranks.

    Its processes, which have imported the plugin, are those that later runs find (`kept`).
    """
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    values = options(toys, toys.tied) | {"rollout.num_engines": 2, "rollout.max_model_len": 64,
                                                "plugins": [str(plugin)]}
    try:
        with kept_processes():
            result = FluxTrainer(FluxConfig(algorithm="grpo", **values, run_dir=str(run_dir))).fit(str(toys.data))
        assert result.run_dir == run_dir and result.model_path.is_dir() and result.num_steps == NUM_STEPS
        assert [line["step"] for line in result.history] == list(range(NUM_STEPS))
        yield run_dir
    finally:
        KeptCluster.end()


@pytest.fixture(scope="package")
def kept(whole) -> Callable[..., AbstractContextManager[None]]:
    """`with kept():` runs within it are on the processes of `whole`; `kept(other_engines=True)` where their
    model or options differ from those of `whole`, `kept(anew=[ENGINE])` where one dies and its run with it."""
    return kept_processes
