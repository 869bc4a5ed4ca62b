"""Preference rows as prompts: the start that both responses share."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_ray.config import from_dict
from flux_ray.data import PromptSource
from flux_ray.data.preferences import REPLY, shared_prompt
from flux_ray.data.rows import BadCell
from flux_ray.errors import UserError
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.unit

START = "\n\nHuman: hi\n\nAssistant: Hello\n\nHuman: and?\n\nAssistant:"
HH = Path(__file__).parents[3] / "shared" / "data" / "hh_rlhf" / "harmless-base.jsonl.gz"


def test_up_to_the_last_reply_before_they_part():
    assert shared_prompt({"chosen": f"{START} So be it.", "rejected": f"{START} So what?"}) == START
    # They go on after they have parted: that is no prompt, even where the same reply mark follows in both.
    longer = " No.\n\nHuman: x\n\nAssistant: y"
    assert shared_prompt({"chosen": f"{START}{longer}", "rejected": f"{START} Yes{longer}"}) == START


def test_messages():
    user, good, bad = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "a"), ("assistant", "b")))
    assert shared_prompt({"chosen": [user, good], "rejected": [user, bad]}) == [user]
    turns = [user, good, user]
    assert shared_prompt({"chosen": [*turns, good], "rejected": [*turns, bad]}) == turns


@pytest.mark.parametrize("row", [
    {"chosen": "Human: a", "rejected": "Human: b"}, {"chosen": None, "rejected": START},
    {"chosen": [{"role": "user", "content": "x"}], "rejected": [{"role": "user", "content": "y"}]},
])
def test_nothing_shared(row):
    with pytest.raises(BadCell):
        shared_prompt(row)


def source(rows, **data):
    config = from_dict({"data": {"shuffle": False, **data}, "rollout.max_tokens": 8})
    return PromptSource.from_config(config, tiny_tokenizer(), context_length=4096, prompts=rows)


def test_rows_under_a_prompt_algorithm():
    rows = [{"chosen": f"{START} a", "rejected": f"{START} b"}, {"chosen": "x", "rejected": "y"}]
    prompts = source(rows, on_bad_row="skip")
    assert prompts.prompt(0).text == START and prompts.num_skipped == 1
    assert prompts.columns == {"chosen", "rejected"} and prompts.prompt(0).columns["chosen"] == f"{START} a"
    with pytest.raises(UserError, match=r"row 2 \(from 1\): column 'chosen': chosen and rejected share no text"):
        source(rows)


def test_a_prompt_column_of_their_own_is_taken():
    assert source([{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]).prompt(0).text == "1+1="


@pytest.mark.skipif(not HH.is_file(), reason=f"{HH} isn't here")
def test_published_preference_rows():
    prompts = source(str(HH), on_bad_row="skip")
    assert prompts.num_rows > 1000
    texts = [prompts.prompt(uid).text for uid in range(prompts.num_rows)]
    assert all(text.startswith("\n\nHuman:") and text.endswith(REPLY) for text in texts)
