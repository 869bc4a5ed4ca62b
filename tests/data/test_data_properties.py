"""Whatever rows hold: they come back as they were written, or are refused in one line with their place."""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis", reason="hypothesis isn't installed: pip install -e '.[test]'")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flux_ray.config import SFTConfig, from_dict
from flux_ray.data import PromptSource, SftSource, chat
from flux_ray.data.encode import fill_template
from flux_ray.data.order import EpochOrder, MixedOrder
from flux_ray.data.rows import BadCell, Rows, inside
from flux_ray.data.sources import load_rows
from flux_ray.data.tokens import encode_continuations, encode_starts
from flux_ray.errors import UserError
from tests.data.conftest import CHARACTERS, CHAT_TEMPLATE, make_tokenizer
from tests.data.test_data_tokens import blank_first

pytestmark = pytest.mark.unit

TOKENIZER = make_tokenizer(chat_template=CHAT_TEMPLATE)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))   # whatever UTF-8 can hold
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6)
ROWS = st.lists(st.dictionaries(TEXTS, JSON, min_size=1, max_size=4), min_size=1, max_size=6)
KNOWN = st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=20)
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])   # a busy machine


@FEW
@given(ROWS)
def test_json_rows_come_back_as_they_were_written(rows):
    columns = list(dict.fromkeys(name for row in rows for name in row))
    whole = [{name: row.get(name) for name in columns} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        lines, together = Path(folder, "a.jsonl"), Path(folder, "a.json")
        lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        together.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
        for path in (lines, together):
            assert list(load_rows(path, split="train", max_rows=None).rows) == whole


@FEW
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.sampled_from([(".csv", ","), (".tsv", "\t")]))
def test_cells_of_a_table_come_back_as_text(cells, form):
    ending, delimiter = form
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{ending}")
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, delimiter=delimiter).writerows([("prompt", "answer"), *cells])
        rows = load_rows(path, split="train", max_rows=None).rows
    assert [(row["prompt"], row["answer"]) for row in rows] == cells


@FEW
@given(ROWS)
def test_a_way_leads_where_its_names_say(rows):
    table = Rows.from_dicts("it", [{"outer": {"inner": row}} for row in rows])
    for row in table.rows:
        for name, value in row["outer"]["inner"].items():
            if "." not in name:
                assert inside(row, f"outer.inner.{name}") == value


@FEW
@given(JSON)
def test_any_cell_is_a_prompt_or_a_bad_row_in_one_line(cell):
    config = from_dict({"rollout.max_tokens": 8})
    rows = [{"prompt": "1+1="}, {"prompt": cell, "messages": cell, "completion": cell}]
    try:
        source = PromptSource.from_config(config, TOKENIZER, context_length=4096, prompts=rows)
        assert source.num_rows == 2 and isinstance(cell, (str, list))
    except UserError as error:
        assert "row 2 (from 1): column 'prompt': " in str(error) and "\n" not in str(error)
    try:
        rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
                {"messages": cell}]
        SftSource.from_config(SFTConfig(), TOKENIZER, context_length=4096, rows=rows)
    except UserError as error:
        assert "row 2 (from 1): column 'messages': " in str(error) and "\n" not in str(error)


@FEW
@given(st.text(max_size=20), st.dictionaries(st.sampled_from(["answer", "level"]), JSON), TEXTS)
def test_any_template_gives_a_text_or_says_why_not(template, row, prompt):
    try:
        assert isinstance(fill_template(template, row, prompt), str)
    except (UserError, BadCell) as error:
        assert "data.prompt_template" in str(error)


@FEW
@given(TEXTS, TEXTS)
def test_what_a_template_fills_in_is_never_a_template_itself(prompt, answer):
    filled = fill_template("<{prompt}|{answer}>", {"answer": answer}, prompt)
    assert filled == f"<{prompt}|{answer}>"


@FEW
@given(KNOWN, KNOWN)
def test_prompt_and_completion_decode_to_their_texts(prompt, completion):
    ids = np.concatenate([encode_starts(TOKENIZER, [(prompt, False)])[0],
                          encode_continuations(TOKENIZER, [completion])[0]])
    assert TOKENIZER.decode(ids) == prompt + completion


PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=20)
SPECIAL = ("<s>", "</s>", "<unk>")


@pytest.mark.parametrize("form", ["normalizer", "always", "first"])
def test_they_do_under_tokenizers_that_add_a_blank(form):
    tokenizer = blank_first(form)

    @FEW
    @given(PRINTABLE, PRINTABLE)
    def holds(prompt, completion):
        if prompt.startswith(" ") or any(word in prompt + completion for word in SPECIAL):
            return   # of one blank at a text's start and of none these tokenizers make the same
        ids = np.concatenate([encode_starts(tokenizer, [(prompt, False)])[0],
                              encode_continuations(tokenizer, [completion])[0]])
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion

    holds()


@FEW
@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 100)), min_size=1, max_size=5), st.integers(0, 2**30),
       st.booleans(), st.integers(0, 5000))
def test_a_mixture_is_the_same_from_any_position_on(sets, seed, shuffle, start):
    def order():
        orders = [EpochOrder(size, seed=seed, shuffle=shuffle, name=f"s{i}") for i, (size, _) in enumerate(sets)]
        return MixedOrder(orders, [weight for _, weight in sets], seed=seed, shuffle=shuffle)

    straight, resumed = order(), order()
    expected = [straight.row(position) for position in range(start + 50)][start:]
    assert [resumed.row(position) for position in range(start, start + 50)] == expected
    assert all(0 <= row < sum(size for size, _ in sets) for row in expected)


# Chats


ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLES, "content": st.text(max_size=20)}), min_size=1, max_size=5)
PLAIN_CHAT = ("{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
              "{% if add_generation_prompt %}<assistant>{% endif %}")
PLAIN_TOKENIZER = make_tokenizer(chat_template=PLAIN_CHAT)


@FEW
@given(MESSAGES)
def test_a_chat_s_prompt_has_every_message_and_ends_where_the_assistant_begins(messages):
    tokenizer = PLAIN_TOKENIZER
    body = "".join(f"<{message['role']}>{message['content']}</s>" for message in messages)
    assert chat.render(tokenizer, messages, {}, whole=True) == body
    if messages[-1]["role"] != "assistant":
        assert chat.render(tokenizer, messages, {}) == f"{body}<assistant>"
        return
    try:
        going_on = chat.render(tokenizer, messages, {})
    except BadCell:   # a last message of blanks alone can't be gone on with
        assert not messages[-1]["content"].strip()
        return
    assert body.startswith(going_on) and going_on.rstrip() == body.removesuffix("</s>").rstrip()


@FEW
@given(MESSAGES, st.none() | st.text(max_size=9))
def test_a_system_prompt_stands_first_and_a_reply_is_cut_off(messages, system):
    with_it = chat.with_system(messages, system)
    assert with_it[-len(messages):] == messages and len(with_it) - len(messages) in (0, 1)
    assert system is None or with_it[0]["role"] == "system"
    try:
        left = chat.without_reply(messages)
    except BadCell:
        assert all(message["role"] == "assistant" for message in messages)
    else:
        assert left == messages[:len(left)] and left[-1]["role"] != "assistant"
        assert all(message["role"] == "assistant" for message in messages[len(left):])


@FEW
@given(st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["role", "content", "tool_calls", "x"]), inner, max_size=3),
                    max_leaves=8))
def test_any_cell_is_a_chat_or_is_told_why_not(cell):
    value = cell if isinstance(cell, list) else [cell]
    try:
        messages = chat.checked_messages(value)
    except BadCell as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(message["role"], str) for message in messages)
