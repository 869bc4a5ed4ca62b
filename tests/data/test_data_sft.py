import copy
import json

import numpy as np
import pytest

from flux_ray.config import from_dict
from flux_ray.data.sft import SftSource
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

PAIRS = [{"prompt": f"{number}+1=", "completion": str(number + 1)} for number in range(5)]


def make(tokenizer, rows, *, seed=0, context_length=64, **data):
    config = from_dict({"algo.name": "sft", "seed": seed, "data": data})
    return SftSource.from_config(config, tokenizer, context_length=context_length, rows=rows)


def parts(tokenizer, sample):
    """The text without the loss, and the text under it."""
    ids, mask = sample.token_ids, sample.loss_mask
    return tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask])


def test_the_loss_lies_on_the_completion_and_its_end_token(plain_tokenizer):
    sample = make(plain_tokenizer, PAIRS, shuffle=False).batch(0, 2)[1]
    assert parts(plain_tokenizer, sample) == ("1+1=", "2<eos>")
    assert sample.token_ids.dtype == np.int32 and sample.loss_mask.tolist() == [False] * 4 + [True] * 2
    assert not sample.loss_weights.any() and sample.advantages is None and sample.sampler_logprobs is None


def test_an_end_token_that_is_there_is_not_doubled(plain_tokenizer):
    (sample,) = make(plain_tokenizer, [{"prompt": "a", "completion": "b<eos>"}]).batch(0, 1)
    assert parts(plain_tokenizer, sample) == ("a", "b<eos>")


def test_messages_are_learned_at_the_last_turn_up_to_its_end_token(chat_tokenizer):
    messages = [
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
    ]
    (sample,) = make(chat_tokenizer, [{"messages": messages}], system_prompt="Add.").batch(0, 1)
    before = "[system]Add.<eos>\n[user]1+1<eos>\n[assistant]2<eos>\n[user]2+2<eos>\n[assistant]"
    assert parts(chat_tokenizer, sample) == (before, "4<eos>")


def test_a_chat_ends_where_a_rollout_of_the_model_does(chat_tokenizer, tmp_path):
    """A template that ends a turn with a token of its own, before the tokenizer's: engines stop at the former."""
    end_of_turn = chat_tokenizer.convert_tokens_to_ids("\n")
    ends = [chat_tokenizer.eos_token_id, end_of_turn]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    chat_tokenizer = copy.deepcopy(chat_tokenizer)
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace("<eos>\n", "\n<eos>")
    config = from_dict({"algo.name": "sft", "model.path": str(tmp_path)})
    rows = [{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}]
    (sample,) = SftSource.from_config(config, chat_tokenizer, context_length=64, rows=rows).batch(0, 1)
    assert parts(chat_tokenizer, sample)[1] == "4\n"


@pytest.mark.parametrize("completion", ["4", [{"role": "assistant", "content": "4"}]])
@pytest.mark.parametrize(("prompt", "as_chat"), [("2+2", True), ([{"role": "user", "content": "2+2"}], False)])
def test_a_chat_prompt_with_a_completion(chat_tokenizer, prompt, as_chat, completion):
    (sample,) = make(chat_tokenizer, [{"prompt": prompt, "completion": completion}], as_chat=as_chat).batch(0, 1)
    assert parts(chat_tokenizer, sample) == ("[user]2+2<eos>\n[assistant]", "4<eos>")


def test_plain_text_is_learned_but_for_its_first_token(plain_tokenizer):
    (sample,) = make(plain_tokenizer, [{"text": "abc"}]).batch(0, 1)
    assert parts(plain_tokenizer, sample) == ("a", "bc<eos>")


def test_a_batch_depends_on_seed_and_step_alone(plain_tokenizer):
    def texts(source, step):
        return [plain_tokenizer.decode(sample.token_ids) for sample in source.batch(step, 3)]

    one, two = make(plain_tokenizer, PAIRS, seed=1), make(plain_tokenizer, PAIRS, seed=1)
    forwards = [texts(one, step) for step in range(5)]
    assert forwards == [texts(two, step) for step in reversed(range(5))][::-1]
    flat = [text for batch in forwards for text in batch]
    assert sorted(flat[:5]) == sorted(flat[5:10]) == sorted(flat[10:]) and len(set(flat)) == 5


@pytest.mark.parametrize(
    ("row", "column", "why"),
    [
        ({"prompt": "a", "completion": None}, "completion", "missing"),
        ({"prompt": None, "completion": "b"}, "prompt", "missing"),
        ({"prompt": "a", "completion": 3}, "completion", "got int 3"),
        ({"prompt": "a", "completion": [{"role": "user", "content": "b"}]}, "completion", "one message of the"),
        ({"messages": [{"role": "user", "content": "b"}]}, "messages", "must be the assistant's"),
        ({"messages": "b"}, "messages", "got str"),
        ({"text": ""}, "text", "empty"),
        ({"text": "x" * 64}, "text", "65 tokens, more than the context of 64"),
    ],
)
def test_a_bad_row_stops_or_is_skipped(chat_tokenizer, row, column, why):
    good = {name: {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}.get(name, "t")
            for name in row}  # fmt: skip
    with pytest.raises(UserError, match=r"prompts in memory row 2 \(from 1\)") as error:
        make(chat_tokenizer, [good, row])
    assert why in str(error.value) and f"column '{column}'" in str(error.value)
    source = make(chat_tokenizer, [good, row], on_bad_row="skip")
    assert (source.num_rows, source.num_skipped) == (1, 1)


def test_data_with_nothing_to_learn_from_are_refused(plain_tokenizer):
    with pytest.raises(UserError, match=r"no column 'completion'.*\(columns: prompt, answer\)"):
        make(plain_tokenizer, [{"prompt": "a", "answer": "b"}])
    with pytest.raises(UserError, match=r"data\.train is not set"):
        make(plain_tokenizer, None)
    with pytest.raises(UserError, match="no chat template"):
        make(plain_tokenizer, [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}])


def test_a_chat_that_the_template_refuses_is_a_bad_row(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% if messages[0].content == 'no' %}{{ raise_exception('no') }}{% endif %}hi"
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
            for text in ("yes", "no")]  # fmt: skip
    with pytest.raises(UserError, match=r"row 2 \(from 1\): column 'messages': the chat template refuses it: no"):
        make(tokenizer, rows)
    assert make(tokenizer, rows, on_bad_row="skip").num_skipped == 1
