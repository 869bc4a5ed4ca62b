"""Preference pairs of every form; what is left out and counted; what is refused by its row."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_ray.config import from_dict
from flux_ray.data import PairSource
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

START = "\n\nHuman: hi\n\nAssistant: Hello\n\nHuman: and?\n\nAssistant:"
HH = Path(__file__).parents[3] / "shared" / "data" / "hh_rlhf" / "harmless-base.jsonl.gz"
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "a"), ("assistant", "b")))


def source(tokenizer, rows, *, context_length=200, **data):
    config = from_dict({"algo.name": "dpo", "data": {"shuffle": False, **data}})
    return PairSource.from_config(config, tokenizer, context_length=context_length, rows=rows)


def texts(tokenizer, pair):
    """Prompt, chosen and rejected as text."""
    start = tokenizer.decode(pair.chosen_ids[: pair.prompt_length])
    assert start == tokenizer.decode(pair.rejected_ids[: pair.prompt_length])
    return start, *(tokenizer.decode(ids[pair.prompt_length :]) for ids in (pair.chosen_ids, pair.rejected_ids))


def test_replies_to_a_prompt(plain_tokenizer):
    pairs = source(plain_tokenizer, [{"prompt": "1+1=", "chosen": "2", "rejected": "11"}])
    (pair,) = pairs.batch(0, 1)
    assert texts(plain_tokenizer, pair) == ("1+1=", "2<eos>", "11<eos>")
    assert pair.row == 0 and pair.margin == 0.0 and pairs.longest == 7 and not pairs.has_margins
    assert pairs.warnings() == []


def test_two_transcripts(plain_tokenizer):
    (pair,) = source(plain_tokenizer, [{"chosen": f"{START} So.", "rejected": f"{START} So what?"}]).all()
    assert texts(plain_tokenizer, pair) == (START, " So.<eos>", " So what?<eos>")


@pytest.mark.parametrize("row", [
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": "a", "rejected": "b"},
    {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},   # the chats bring their own prompt
])
def test_chats(chat_tokenizer, row):
    (pair,) = source(chat_tokenizer, [row]).all()
    assert texts(chat_tokenizer, pair) == ("[user]hi<eos>\n[assistant]", "a<eos>", "b<eos>")


def test_a_system_prompt_and_plain_text_as_chat(chat_tokenizer):
    row = {"prompt": "hi", "chosen": "a", "rejected": "b"}
    (pair,) = source(chat_tokenizer, [row], as_chat=True, system_prompt="Add.").all()
    assert texts(chat_tokenizer, pair)[0] == "[system]Add.<eos>\n[user]hi<eos>\n[assistant]"


def test_margins(plain_tokenizer):
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b", "margin": margin} for margin in (1.5, "2", None)]
    pairs = source(plain_tokenizer, rows)
    assert pairs.has_margins and [pair.margin for pair in pairs.all()] == [1.5, 2.0, 0.0]
    for wrong in ("much", True, float("nan"), [1]):
        with pytest.raises(UserError, match=r"row 1 \(from 1\): column 'margin': must be a finite number"):
            source(plain_tokenizer, [{**rows[0], "margin": wrong}])


def test_rows_that_say_nothing_are_counted_and_told(plain_tokenizer):
    good = {"chosen": f"{START} a", "rejected": f"{START} b"}
    rows = [good, {"chosen": f"{START} a", "rejected": f"{START}"}, {"chosen": f"{START} ", "rejected": f"{START} b"},
            {"chosen": START, "rejected": START}, {"chosen": f"{START} ☃", "rejected": f"{START} ☂"}]
    pairs = source(plain_tokenizer, rows)   # the last two are one to the tokenizer: both signs are unknown
    assert pairs.num_rows == 1 and pairs.num_skipped == 4
    assert pairs.skipped["empty"] == 2 and pairs.skipped["identical"] == 2
    assert pairs.warnings() == ["prompts in memory: pairs left out: 2 empty, 2 identical"]
    with pytest.raises(UserError, match="no pair is left: 1 identical"):
        source(plain_tokenizer, rows[3:4])


@pytest.mark.parametrize(("row", "message"), [
    ({"chosen": "x", "rejected": "y"}, "column 'chosen': chosen and rejected share no text up to a reply"),
    ({"chosen": f"{START} {'a' * 200}", "rejected": f"{START} b"}, "more than the context of 200"),
    ({"chosen": None, "rejected": f"{START} b"}, "must be two texts or two lists of messages"),
    ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]}, "one message of the assistant's must"),
    ({"chosen": [USER], "rejected": [BAD]}, "must be two texts or two lists of messages with a start in common"),
    ({"prompt": "p", "chosen": 3, "rejected": "b"}, "must be text or a list of messages, got int 3"),
])
def test_bad_rows_by_number(chat_tokenizer, row, message):
    good = {"chosen": f"{START} a", "rejected": f"{START} b"}
    with pytest.raises(UserError, match=r"row 2 \(from 1\)") as caught:
        source(chat_tokenizer, [good, row])
    assert message in str(caught.value) and "data.on_bad_row=skip" in str(caught.value)
    pairs = source(chat_tokenizer, [row, good], on_bad_row="skip")
    assert pairs.num_rows == 1 and pairs.all()[0].row == 1 and pairs.warnings() == [
        "prompts in memory: pairs left out: 1 bad"]


def test_prompts_are_no_pairs(plain_tokenizer):
    with pytest.raises(UserError, match=r"algo\.name=dpo learns from preference pairs: no column 'chosen' and no "
                                        r"column 'rejected' \(columns: prompt, answer\)"):
        source(plain_tokenizer, [{"prompt": "1+1=", "answer": "2"}])


def test_batches_go_over_all_pairs_epoch_by_epoch(plain_tokenizer):
    rows = [{"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(5)]
    pairs = source(plain_tokenizer, rows, shuffle=True)
    drawn = [pair.row for step in range(5) for pair in pairs.batch(step, 2)]
    assert sorted(drawn[:5]) == sorted(drawn[5:]) == list(range(5))
    assert [pair.row for pair in pairs.all()] == list(range(5))


@pytest.mark.skipif(not HH.is_file(), reason=f"{HH} isn't here")
def test_published_transcripts_as_they_are(plain_tokenizer):
    pairs = source(plain_tokenizer, str(HH), context_length=5000)
    assert pairs.num_rows == 1152 and dict(pairs.skipped) == {"empty": 4, "bad": 0}
    assert all(texts(plain_tokenizer, pair)[0].endswith("\n\nAssistant:") for pair in pairs.all()[:50])
