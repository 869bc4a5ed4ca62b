"""The forms in which rows come, and what a chat's cells may hold."""

from __future__ import annotations

import copy
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flux_ray.config import from_dict, validate
from flux_ray.data import PairSource, PromptSource, SftSource
from flux_ray.data.forms import as_chat
from flux_ray.data.preferences import CHOSEN, REJECTED
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

SHAREGPT = [{"from": "human", "value": "1+1"}, {"from": "gpt", "value": "2"},
            {"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]


def prompts(tokenizer, rows, **data):
    data = {f"data.{name}": value for name, value in data.items()}
    config = from_dict({"data.shuffle": False, "rollout.max_tokens": 16, **data})
    return PromptSource.from_config(config, tokenizer, context_length=256, prompts=rows)


def sft(tokenizer, rows, **data):
    config = from_dict({"algo.name": "sft", "data.shuffle": False, **{f"data.{k}": v for k, v in data.items()}})
    return SftSource.from_config(config, tokenizer, context_length=256, rows=rows)


def parts(tokenizer, sample):
    ids, mask = sample.token_ids, sample.loss_mask
    return tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask])


def test_a_column_by_dots_is_a_nested_cell(plain_tokenizer):
    rows = [{"q": {"text": "1+1="}, "reward_model": {"style": "rule", "ground_truth": "2"}},
            {"q": {"text": "2+2="}, "reward_model": None}]
    source = prompts(plain_tokenizer, rows, prompt_column="q.text", answer_column="reward_model.ground_truth")
    assert [source.prompt(uid).text for uid in range(2)] == ["1+1=", "2+2="]
    assert [source.prompt(uid).columns["reward_model.ground_truth"] for uid in range(2)] == ["2", None]
    with pytest.raises(UserError, match=r"unknown column 'q\.txt': did you mean 'q\.text'"):
        prompts(plain_tokenizer, rows, prompt_column="q.txt")


def test_a_column_with_dots_in_its_own_name_stays_what_it_is(plain_tokenizer):
    rows = [{"a.b": "own", "a": {"b": "nested"}}]
    assert prompts(plain_tokenizer, rows, prompt_column="a.b").prompt(0).text == "own"


def test_a_template_takes_nested_cells(plain_tokenizer):
    rows = [{"prompt": "1+1", "extra": {"unit": "m", "tries": [3]}}]
    source = prompts(plain_tokenizer, rows, prompt_template="{prompt} in {extra.unit}, {extra.tries.0} tries")
    assert source.prompt(0).text == "1+1 in m, 3 tries"


def test_instruction_input_output(plain_tokenizer):
    rows = [{"instruction": "Add.", "input": "1+1", "output": "2"},
            {"instruction": "Say 4", "input": "", "output": "4"}]
    samples = sft(plain_tokenizer, rows).all()
    assert [parts(plain_tokenizer, sample) for sample in samples] == [
        ("Add.\n\n1+1", "2<eos>"), ("Say 4", "4<eos>")]
    assert [prompts(plain_tokenizer, rows).prompt(uid).text for uid in range(2)] == ["Add.\n\n1+1", "Say 4"]


def test_instruction_rows_may_be_chats(chat_tokenizer):
    rows = [{"instruction": "Add.", "input": "1+1", "output": "2"}]
    (sample,) = sft(chat_tokenizer, rows, as_chat=True).all()
    assert parts(chat_tokenizer, sample) == ("[user]Add.\n\n1+1<eos>\n[assistant]", "2<eos>")


def test_sharegpt_s_roles_are_a_chat_s_under_a_chat_s_names_too(chat_tokenizer):
    chat = [{"role": "human", "content": "1+1"}, {"role": "gpt", "content": "2"}]
    (sample,) = sft(chat_tokenizer, [{"messages": chat}]).all()
    assert parts(chat_tokenizer, sample) == ("[user]1+1<eos>\n[assistant]", "2<eos>")


@pytest.mark.parametrize(("kind", "replies"), [("sft", ["completion"]), ("dpo", ["chosen", "rejected"])])
def test_replies_that_all_begin_with_their_prompts_are_told(plain_tokenizer, kind, replies):
    make = {"sft": SftSource, "dpo": PairSource}[kind]

    def warnings(begin):
        rows = [{"prompt": f"Q: {i}", **{name: f"{begin(i)} {name}" for name in replies}} for i in range(12)]
        config = from_dict({"algo.name": kind})
        return make.from_config(config, plain_tokenizer, context_length=64, rows=rows).warnings()

    (warning,) = warnings(lambda i: f"Q: {i}")
    assert f"every {' and '.join(replies)} begins with its prompt, which the model reads twice then" in warning
    assert warnings(lambda i: f"Q: {i}" if i else "Q: 9") == []


@pytest.mark.parametrize("column", ["conversations", "conversation", "messages"])
def test_sharegpt_rows_are_chats(chat_tokenizer, column):
    (sample,) = sft(chat_tokenizer, [{column: SHAREGPT, "system": "Add."}]).all()
    system = "" if column == "messages" else "[system]Add.<eos>\n"
    assert parts(chat_tokenizer, sample) == (
        f"{system}[user]1+1<eos>\n[assistant]2<eos>\n[user]2+2<eos>\n[assistant]", "4<eos>")
    source = prompts(chat_tokenizer, [{column: SHAREGPT}], prompt_column=column)
    assert source.prompt(0).text == as_chat(SHAREGPT)[:3]


def test_the_reply_in_a_prompt_is_cut_off_with_a_warning(chat_tokenizer):
    chat = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "It is 2"}]
    source = prompts(chat_tokenizer, [{"messages": chat}, {"messages": chat[:1]}], prompt_column="messages")
    assert [source.prompt(uid).text for uid in range(2)] == [chat[:1], chat[:1]]
    assert chat_tokenizer.decode(source.prompt(0).token_ids) == "[user]1+1<eos>\n[assistant]"
    (warning,) = source.warnings()
    assert warning == ("prompts in memory: 1 prompts end with a message of the assistant's, which is left out "
                       "(data.prefill=true goes on with it)")
    with pytest.raises(UserError, match=r"row 1 .*no message but the assistant's"):
        prompts(chat_tokenizer, [{"messages": chat[1:]}], prompt_column="messages")


def test_every_turn_of_the_assistant_s_is_learned_where_asked_for(chat_tokenizer):
    (sample,) = sft(chat_tokenizer, [{"messages": SHAREGPT}], learn_turns="all").all()
    assert parts(chat_tokenizer, sample) == (
        "[user]1+1<eos>\n[assistant]\n[user]2+2<eos>\n[assistant]", "2<eos>4<eos>")
    assert chat_tokenizer.decode(sample.token_ids) == (
        "[user]1+1<eos>\n[assistant]2<eos>\n[user]2+2<eos>\n[assistant]4<eos>")


def test_a_template_that_rewrites_earlier_turns_gives_a_sample_for_each(chat_tokenizer):

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]"
        "{% if m['role'] == 'assistant' and loop.last %}(thinks){% endif %}{{ m['content'] }}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}")
    source = sft(tokenizer, [{"messages": SHAREGPT}], learn_turns="all")
    assert [parts(tokenizer, sample) for sample in source.all()] == [
        ("[user]1+1<eos>\n[assistant]", "(thinks)2<eos>"),
        ("[user]1+1<eos>\n[assistant]2<eos>\n[user]2+2<eos>\n[assistant]", "(thinks)4<eos>"),
    ]


def test_what_opens_the_next_turn_may_be_what_ends_one(chat_tokenizer, tmp_path):
    """GLM's turns have no end of their own: engines stop at the next one's first token."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = ("{% for m in messages %}{% if m.role == 'assistant' %}!{% else %}?{% endif %}"
                               "{{ m.content }}{% endfor %}{% if add_generation_prompt %}!{% endif %}")
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("?")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    config = from_dict({"algo.name": "sft", "data.learn_turns": "all", "model.path": str(tmp_path)})
    (sample,) = SftSource.from_config(config, tokenizer, context_length=64, rows=[{"messages": SHAREGPT}]).all()
    assert parts(tokenizer, sample) == ("?1+1!2+2!", "2?4<eos>")
    assert tokenizer.decode(sample.token_ids) == "?1+1!2?2+2!4<eos>"


def test_a_chat_without_a_turn_to_learn_is_bad(chat_tokenizer):
    good, bad = {"messages": SHAREGPT}, {"messages": SHAREGPT[1:2]}
    with pytest.raises(UserError, match=r"row 2 .*no message of the assistant's after another's"):
        sft(chat_tokenizer, [good, bad], learn_turns="all")
    trailing = {"messages": [*SHAREGPT, {"from": "human", "value": "thanks"}]}
    assert sft(chat_tokenizer, [trailing], learn_turns="all").num_rows == 1


def test_a_conversation_with_two_replies_is_a_pair(chat_tokenizer):
    row = {"conversations": SHAREGPT[:1], CHOSEN: {"from": "gpt", "value": "2"},
           REJECTED: {"from": "gpt", "value": "3"}}
    config = from_dict({"algo.name": "dpo"})
    (pair,) = PairSource.from_config(config, chat_tokenizer, context_length=64, rows=[row]).all()
    prompt = "[user]1+1<eos>\n[assistant]"
    assert chat_tokenizer.decode(pair.chosen_ids) == f"{prompt}2<eos>"
    assert chat_tokenizer.decode(pair.rejected_ids) == f"{prompt}3<eos>"


def test_content_in_parts_of_text_is_one_text_and_empty_keys_are_none(chat_tokenizer):
    chat = [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1"}], "name": None}]
    assert prompts(chat_tokenizer, [{"prompt": chat}]).prompt(0).text == [{"role": "user", "content": "1+1"}]


def test_what_the_template_gets(chat_tokenizer):

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}<eos>{% endif %}"
    chat = [{"prompt": [{"role": "user", "content": "q"}]}]
    source = prompts(tokenizer, chat, chat_template_kwargs={"enable_thinking": False})
    assert tokenizer.decode(source.prompt(0).token_ids) == "[user]q<eos>\n[assistant]<eos>"
    with pytest.raises(UserError, match=r"has no 'enable_thinkin' in its chat template"):
        prompts(tokenizer, chat, chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(UserError, match=r"'add_generation_prompt' is set by what the prompt is for"):
        prompts(tokenizer, chat, chat_template_kwargs={"add_generation_prompt": False})


@pytest.mark.parametrize(("key", "value", "why"), [
    ("data.prompt_template", "Solve it step by step.", r"has no \{prompt\}"),
    ("data.prompt_template", "None", "is the word None: nothing is written null"),
    ("data.system_prompt", "None", "is the word None"),
    ("data.prompt_template", "{} {prompt}", r"name what goes into \{\}"),
    ("data.prompt_template", "{prompt", "write a brace twice to keep it"),
])
def test_a_template_that_would_make_all_prompts_one_is_refused(key, value, why):
    config = from_dict({"model.path": "m", "data.train": "d.jsonl", key: value})
    with pytest.raises(UserError, match=why):
        validate(config)


def test_text_that_is_half_a_character_is_a_bad_row(plain_tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "\\ud83d"}\n')
    with pytest.raises(UserError, match=r"row 2 .*no valid text"):
        prompts(plain_tokenizer, str(file))
    assert json.loads(file.read_text().splitlines()[0]) == {"prompt": "a"}


def test_tools_and_a_row_s_own_arguments_reach_the_template(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% for tool in tools or [] %}({{ tool['name'] }}){% endfor %}" + tokenizer.chat_template
    tokenizer.chat_template += "{% if think is defined %}{{ think }}{% endif %}"
    chat = [{"role": "user", "content": "q"}]
    rows = [{"prompt": chat, "tools": [{"name": "add"}], "chat_template_kwargs": {"think": "no"}},
            {"prompt": chat, "tools": '[{"name": "mul"}]', "chat_template_kwargs": None},
            {"prompt": chat, "tools": None}]
    source = prompts(tokenizer, rows, chat_template_kwargs={"think": "yes"})
    assert [tokenizer.decode(source.prompt(uid).token_ids) for uid in range(3)] == [
        "(add)[user]q<eos>\n[assistant]no", "(mul)[user]q<eos>\n[assistant]yes", "[user]q<eos>\n[assistant]yes"]
    with pytest.raises(UserError, match=r"row 1 .*column 'tools': must be a list of tools' schemas"):
        prompts(tokenizer, [{"prompt": chat, "tools": "a calculator"}])
    with pytest.raises(UserError, match="has no 'tools' in its chat template"):
        prompts(chat_tokenizer, rows[1:])


def test_fields_that_a_table_fills_in_reach_no_template(chat_tokenizer, tmp_path):
    """A Parquet file gives each call of a tool, and each tool, the fields of all."""
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{{ tools | tojson }}{{ messages | tojson }}"
    rows = [{"tools": [{"name": "add", "parameters": {"a": {"type": "int"}}}],
             "prompt": [{"role": "assistant", "content": "",
                         "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}, {"role": "tool", "content": "2"}]},
            {"tools": [{"name": "say", "parameters": {"text": {"type": "str"}}}],
             "prompt": [{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = prompts(tokenizer, str(tmp_path / "rows.parquet"))
    assert [tokenizer.decode(source.prompt(uid).token_ids) for uid in range(2)] == [
        json.dumps(row["tools"]) + json.dumps(row["prompt"]) for row in rows]


@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "python"])
def test_a_chat_in_a_table_of_text_is_a_chat(chat_tokenizer, write):
    chat = [{"role": "user", "content": "it's 1+1"}]
    assert prompts(chat_tokenizer, [{"prompt": write(chat)}]).prompt(0).text == chat
    (sample,) = sft(chat_tokenizer, [{"messages": write([*chat, {"role": "assistant", "content": "2"}])}]).all()
    assert parts(chat_tokenizer, sample)[1] == "2<eos>"
    texts = ["[{x} in set]", '[{"role": "user"', "[1, 2]", '[{"a": 1}]']   # no chats
    assert [prompts(chat_tokenizer, [{"prompt": text}]).prompt(0).text for text in texts] == texts


@pytest.mark.parametrize("prompt", [
    {"instruction": "1+1"}, {"messages": [{"role": "user", "content": "1+1"}]}, {"prompt": "1+1"},
])
def test_pairs_take_their_prompt_from_whatever_form_it_has(chat_tokenizer, prompt):
    replies = {CHOSEN: [{"role": "assistant", "content": "2"}], REJECTED: [{"role": "assistant", "content": "3"}]}
    config = from_dict({"algo.name": "dpo", "data.as_chat": True})
    (pair,) = PairSource.from_config(config, chat_tokenizer, context_length=64, rows=[{**prompt, **replies}]).all()
    assert chat_tokenizer.decode(pair.chosen_ids) == "[user]1+1<eos>\n[assistant]2<eos>"


def test_a_reply_of_the_user_s_is_no_pair(chat_tokenizer):
    row = {"prompt": [{"role": "user", "content": "q"}], CHOSEN: [{"role": "assistant", "content": "2"}],
           REJECTED: [{"role": "user", "content": "3"}]}
    with pytest.raises(UserError, match=r"row 1 .*column 'rejected': after what both share, one message of the"):
        PairSource.from_config(from_dict({"algo.name": "dpo"}), chat_tokenizer, context_length=64, rows=[row])


def test_a_turn_that_ends_with_the_end_token_already_has_one(chat_tokenizer):
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<eos>"}]
    (sample,) = sft(chat_tokenizer, [{"messages": messages}]).all()
    assert parts(chat_tokenizer, sample)[1] == "a<eos>"


def test_tokens_that_were_made_elsewhere_are_refused_by_name(plain_tokenizer):
    with pytest.raises(UserError, match=r"nothing to learn from.*\(columns: input_ids, labels\)"):
        sft(plain_tokenizer, [{"input_ids": [1, 2], "labels": [1, 2]}])


def test_what_a_message_has_beside_its_text_reaches_the_template(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
        "{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "reasoning_content": "so", "content": "a"}]
    (sample,) = sft(tokenizer, [{"messages": messages}]).all()
    assert parts(tokenizer, sample) == ("[user]q<eos>[assistant]", "(so)a<eos>")
