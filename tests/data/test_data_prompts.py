import copy
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from flux_ray.config import from_dict
from flux_ray.data.order import stable_seed
from flux_ray.data.prompts import PromptSource
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

CONTEXT = 64  # tokens
ROWS = [{"prompt": f"{number}+1=", "answer": str(number + 1)} for number in range(7)]
GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"


def make(tokenizer, prompts=None, *, seed=0, **data):
    config = from_dict({"seed": seed, "data": data, "rollout.group_size": 3, "rollout.max_tokens": 16})
    return PromptSource.from_config(config, tokenizer, context_length=CONTEXT, prompts=prompts)


def test_a_prompt_is_complete(plain_tokenizer):
    prompt = make(plain_tokenizer, ROWS, shuffle=False).prompt(2)
    assert (prompt.uid, prompt.row, prompt.text, prompt.num_samples) == (2, 2, "2+1=", 3)
    assert prompt.columns == {"answer": "3"}
    assert prompt.token_ids.dtype == np.int32
    assert plain_tokenizer.decode(prompt.token_ids) == "2+1="


def test_prompts_from_a_file_and_from_memory_are_the_same(plain_tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    here, there = make(plain_tokenizer, ROWS), make(plain_tokenizer, train=str(path))
    assert [here.prompt(uid).text for uid in range(9)] == [there.prompt(uid).text for uid in range(9)]
    assert make(plain_tokenizer, ["a", "b"], shuffle=False).prompt(1).text == "b"


def test_a_prompt_depends_on_seed_and_uid_alone(plain_tokenizer):
    one, two = make(plain_tokenizer, ROWS, seed=5), make(plain_tokenizer, ROWS, seed=5)
    forwards = [one.prompt(uid) for uid in range(30)]
    backwards = [two.prompt(uid) for uid in reversed(range(30))][::-1]
    assert [(p.row, p.seed) for p in forwards] == [(p.row, p.seed) for p in backwards]
    other = make(plain_tokenizer, ROWS, seed=6)
    assert [p.row for p in forwards] != [other.prompt(uid).row for uid in range(30)]


def test_every_epoch_has_every_row_once_in_another_order(plain_tokenizer):
    source = make(plain_tokenizer, ROWS)
    rows = [source.prompt(uid).row for uid in range(4 * source.num_rows)]
    epochs = [tuple(rows[start : start + 7]) for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_seeds_are_distinct_and_leave_room_for_the_samples(plain_tokenizer):
    config = from_dict({"eval.num_samples": 2})
    train = PromptSource.from_config(config, plain_tokenizer, context_length=300, prompts=ROWS)
    evaluation = PromptSource.for_eval(config, plain_tokenizer, context_length=300, prompts=ROWS)
    seeds = [source.prompt(uid).seed for source in (train, evaluation) for uid in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert evaluation.prompt(3).num_samples == 2 and evaluation.prompt(3).row == 3
    assert stable_seed(0, "train", 0) == 1155400794689359976  # the same in every process, for ever


def test_plain_text_is_encoded_as_the_tokenizer_does_and_chats_by_the_template(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    chat = [{"role": "user", "content": "hi"}]
    source = make(tokenizer, [{"prompt": "hi"}, {"prompt": chat}], shuffle=False)
    assert tokenizer.decode(source.prompt(0).token_ids) == "<eos>hi"
    assert tokenizer.decode(source.prompt(1).token_ids) == "[user]hi<eos>\n[assistant]"
    assert source.prompt(1).text == chat


def test_as_chat_system_prompt_and_template(chat_tokenizer):
    knobs = {"as_chat": True, "system_prompt": "Add.", "prompt_template": "{prompt} ({level})", "shuffle": False}
    source = make(chat_tokenizer, [{"prompt": "1+1", "level": "{easy}"}], **knobs)
    expected = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1 ({easy})"}]
    assert source.prompt(0).text == expected
    assert chat_tokenizer.decode(source.prompt(0).token_ids).startswith("[system]Add.<eos>\n[user]1+1 ({easy})<eos>")
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "x"}]
    assert make(chat_tokenizer, [{"prompt": own}], system_prompt="Add.").prompt(0).text == own


def test_a_chat_that_ends_with_the_assistant_is_gone_on_with_where_the_user_says_so(chat_tokenizer):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "So"}]
    source = make(chat_tokenizer, [{"prompt": chat}], prefill=True)
    assert chat_tokenizer.decode(source.prompt(0).token_ids) == "[user]q<eos>\n[assistant]So"


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        (None, "missing"),
        ("", "empty"),
        (" \n", "empty"),
        (3, "must be text or a list of messages, got int 3"),
        ({"role": "user"}, "got dict"),
        ([], "an empty list of messages"),
        (["hi"], "message 1 is str"),
        ([{"role": "user"}], "message 1: 'content' must be text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1: 'content' must be text, got list"),
        ("x" * 49, "49 tokens, more than the 48 that a context of 64 less rollout.max_tokens=16 leaves"),
    ],
)
def test_a_bad_row_stops_or_is_skipped_and_counted(chat_tokenizer, caplog, cell, why):
    rows = [*ROWS[:2], {"prompt": cell}, *ROWS[2:4]]
    with pytest.raises(UserError) as error:
        make(chat_tokenizer, rows)
    assert "prompts in memory row 3 (from 1): column 'prompt': " in str(error.value) and why in str(error.value)
    with caplog.at_level(logging.WARNING):
        source = make(chat_tokenizer, rows, on_bad_row="skip", shuffle=False)
    assert (source.num_rows, source.num_skipped) == (4, 1)
    assert [source.prompt(uid).row for uid in range(5)] == [0, 1, 3, 4, 0]
    assert "1 of 5 rows left out" in caplog.text and why in caplog.text


def test_all_rows_bad_is_an_error_even_when_they_are_skipped(plain_tokenizer):
    with pytest.raises(UserError, match=r"every row is bad; the first: .* row 1"):
        make(plain_tokenizer, [{"prompt": ""}, {"prompt": None}], on_bad_row="skip")


def test_a_chat_needs_a_tokenizer_with_a_template(plain_tokenizer):
    with pytest.raises(UserError, match=r"row 2 \(from 1\) is a chat, but the tokenizer .* has no chat template"):
        make(plain_tokenizer, [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "b"}]}])


@pytest.mark.parametrize(
    ("rows", "knobs", "message"),
    [
        (ROWS, {"prompt_column": "promt"}, r"unknown column 'promt': did you mean 'prompt'.*data\.prompt_column"),
        (ROWS, {"prompt_template": "{prompt} {levl}"}, "unknown column 'levl'"),
        (ROWS, {"prompt_template": "{prompt"}, "data.prompt_template"),
        (ROWS, {"system_prompt": "Add."}, "data.as_chat=true"),
        ([{"prompt": [{"role": "user", "content": "b"}]}], {"prompt_template": "{prompt}"}, "for plain text"),
        (ROWS, {"max_prompt_tokens": 3}, "4 tokens, more than data.max_prompt_tokens=3"),
        (None, {}, "data.train is not set"),
        (None, {"train": "gone.jsonl"}, "gone.jsonl: no such file"),
    ],
)
def test_a_config_that_does_not_go_with_the_data_is_refused(plain_tokenizer, rows, knobs, message):
    with pytest.raises(UserError, match=message) as error:
        make(plain_tokenizer, rows, **knobs)
    assert "\n" not in str(error.value)


def test_a_response_as_long_as_the_context_is_refused(plain_tokenizer):
    config = from_dict({"rollout.max_tokens": 64})
    with pytest.raises(UserError, match=r"rollout\.max_tokens=64 leaves no room for a prompt in a context of 64"):
        PromptSource.from_config(config, plain_tokenizer, context_length=64, prompts=ROWS)


def test_real_word_problems(plain_tokenizer):
    if not GSM8K.is_file():
        pytest.skip(f"{GSM8K} is not here")
    data = {"train": str(GSM8K), "prompt_column": "question", "max_rows": 200, "prompt_template": "Q: {prompt}\nA:"}
    config = from_dict({"data": data})
    source = PromptSource.from_config(config, plain_tokenizer, context_length=4096)
    assert source.num_rows == 200 and source.columns == {"answer"}
    prompt = source.prompt(0)
    assert prompt.text.startswith("Q: ") and "####" in prompt.columns["answer"]


def test_a_chat_that_the_template_refuses_is_a_bad_row(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system\nrole') }}{% endif %}"
    tokenizer.chat_template = refusal + chat_tokenizer.chat_template
    user = {"role": "user", "content": "q"}
    rows = [{"prompt": [user]}, {"prompt": [{"role": "system", "content": "s"}, user]}, {"prompt": "plain"}]
    with pytest.raises(UserError, match=r"row 2 \(from 1\): column 'prompt': the chat template .* no system") as error:
        make(tokenizer, rows)
    assert "\n" not in str(error.value)
    source = make(tokenizer, rows, on_bad_row="skip", shuffle=False)
    assert [source.prompt(uid).row for uid in range(2)] == [0, 2] and source.num_skipped == 1
    assert tokenizer.decode(source.prompt(0).token_ids) == "[user]q<eos>\n[assistant]"


def test_a_row_whose_value_does_not_fit_the_prompt_template_is_bad(plain_tokenizer):
    rows = [{"prompt": "a", "answer": ["1"]}, {"prompt": "b", "answer": "1"}]
    template = {"prompt_template": "{prompt}{answer[x]}"}
    with pytest.raises(UserError, match=r"row 1 \(from 1\): column 'prompt': data\.prompt_template .*answer\[x\]"):
        make(plain_tokenizer, rows, **template)
    rows = [{"prompt": "a", "answer": {"x": "!"}}, {"prompt": "b", "answer": "1"}]
    source = make(plain_tokenizer, rows, on_bad_row="skip", **template)
    assert (source.num_rows, source.num_skipped, source.prompt(0).text) == (1, 1, "a!")
