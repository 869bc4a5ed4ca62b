"""Models, data and a reward that the whole-system tests share; every program that a test starts ends with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.system.program import Program
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
