"""Several sets: shares by weight, options of their own, what is held out; the same after a resume."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from flux_ray.config import from_dict
from flux_ray.data import PairSource, PromptSource, SftSource
from flux_ray.data.order import EASY_FIRST, UNSURE_FIRST, EpochOrder, MixedOrder, by_pass_rate, shares
from flux_ray.data.sets import EVAL, TRAIN, map_paths, read_sets
from flux_ray.errors import UserError

pytestmark = pytest.mark.unit

MATH = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(7)]
WORDS = [{"question": f"say {i}", "solution": f"it is {i}"} for i in range(3)]


@pytest.fixture
def files(tmp_path):
    for name, rows in (("math", MATH), ("words", WORDS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(tmp_path / f"{name}.jsonl") for name in ("math", "words")}


def config_of(files, **options):
    words = {"path": files["words"], "prompt_column": "question", "answer_column": "solution"}
    return from_dict({"data.train": {"math": {"path": files["math"], "weight": 3}, "words": words},
                      "rollout.max_tokens": 8, "reward.functions": ["numeric", "exact_match"], **options})


def prompts(config, tokenizer):
    return PromptSource.from_config(config, tokenizer, context_length=64)


def test_every_block_of_draws_has_the_sets_by_their_weights(files, plain_tokenizer):
    source = prompts(config_of(files), plain_tokenizer)
    drawn = [source.prompt(uid) for uid in range(2048)]
    for block in (drawn[:1024], drawn[1024:]):
        assert Counter(prompt.data_set for prompt in block) == {"math": 768, "words": 256}
    of_math = [prompt.row for prompt in drawn if prompt.data_set == "math"]
    assert all(sorted(of_math[start : start + 7]) == list(range(7)) for start in range(0, 700, 7))
    assert drawn[0].where.startswith("prompt row ") and " of " in drawn[0].where


def test_a_mixture_is_a_pure_function_of_seed_and_position(files, plain_tokenizer):
    one, two = (prompts(config_of(files), plain_tokenizer) for _ in range(2))
    uids = [*range(0, 3000, 37)]
    forwards = [(one.prompt(uid).data_set, one.prompt(uid).row) for uid in uids]
    backwards = [(two.prompt(uid).data_set, two.prompt(uid).row) for uid in reversed(uids)]
    assert forwards == backwards[::-1]
    other = prompts(config_of(files, seed=1), plain_tokenizer)
    assert forwards != [(other.prompt(uid).data_set, other.prompt(uid).row) for uid in uids]


def test_a_set_s_answer_goes_by_the_run_s_name_for_it(files, plain_tokenizer):
    source = prompts(config_of(files), plain_tokenizer)
    first = {source.prompt(uid).data_set: source.prompt(uid) for uid in range(50)}
    words = first["words"]
    assert words.text.startswith("say ") and words.columns["answer"] == f"it is {words.text[-1]}"
    assert first["math"].columns["answer"] == str(int(first["math"].text[0]) + 1)


def test_a_set_has_its_own_template_limits_and_rewards(files, plain_tokenizer):
    config = config_of(files, **{"data.train": {
        "math": {"path": files["math"], "prompt_template": "Add: {prompt}", "max_rows": 2, "rewards": ["numeric"],
                 "max_tokens": 7},
        "words": {"path": files["words"], "prompt_column": "question", "max_prompt_tokens": 4}}})
    with pytest.raises(UserError, match=r"words\.jsonl row 1 .*5 tokens, more than data\.max_prompt_tokens=4"):
        prompts(config, plain_tokenizer)
    config.data.train["words"]["max_prompt_tokens"] = 5
    source = prompts(config, plain_tokenizer)
    drawn = [source.prompt(uid) for uid in range(100)]
    assert {p.text for p in drawn if p.data_set == "math"} == {"Add: 0+1=", "Add: 1+1="}
    assert {p.rewards for p in drawn if p.data_set == "math"} == {("numeric",)}
    assert {p.rewards for p in drawn if p.data_set == "words"} == {()}
    assert {(p.data_set, p.max_tokens) for p in drawn} == {("math", 7), ("words", None)}
    assert {p.text for p in drawn if p.data_set == "words"} == {"say 0", "say 1", "say 2"}


@pytest.mark.parametrize(("train", "why"), [
    ({"a": {"path": "x.jsonl", "prompt_colum": "q"}}, r"data\.train\.a: unknown option 'prompt_colum': did you mean"),
    ({"a": {"weight": 2}}, r"data\.train\.a: a set is a path"),
    ({"a": {"path": "x.jsonl", "weight": 0}}, r"data\.train\.a\.weight must be a number > 0, got 0"),
    ({"a": {"path": "x.jsonl", "rewards": ["numric"]}}, r"unknown reward 'numric': did you mean 'numeric'"),
    ({"a": {"path": "x.jsonl", "on_bad_row": "drop"}}, r"data\.train\.a: data\.on_bad_row must be one of stop, skip"),
    ({"a/b": "x.jsonl"}, "the name of a set"),
    ({"a": {"path": "x.jsonl", "max_tokens": 10**6}}, r"data\.train\.a\.max_tokens must be a number from 1 to rollout"),
    ({"a": {"path": "x.jsonl", "max_rows": "many"}}, r"data\.max_rows"),
    ({}, "names no set"),
    ([], "a set is a path, a list of paths"),
    (3, "a set is a path, a list of paths"),
    ({"a": {"path": "x.jsonl", "prompt_template": "Solve."}}, r"data\.train\.a: data\.prompt_template='Solve\.' has"),
])
def test_a_wrong_set_is_refused_with_its_key(train, why):
    with pytest.raises(UserError, match=why) as error:
        read_sets(from_dict({"data.train": train, "reward.functions": ["numeric"]}), TRAIN)
    assert "\n" not in str(error.value)


def test_one_set_may_be_a_mapping_or_a_list_of_files(files, plain_tokenizer):
    one = from_dict({"data.train": {"path": files["words"], "prompt_column": "question"}, "rollout.max_tokens": 8})
    assert prompts(one, plain_tokenizer).num_rows == 3 and prompts(one, plain_tokenizer).prompt(0).data_set == ""
    both = from_dict({"data.train": [files["math"], files["math"]], "rollout.max_tokens": 8})
    assert prompts(both, plain_tokenizer).num_rows == 14


def test_evaluations_have_columns_of_their_own_and_every_prompt_of_each_set_once(files, plain_tokenizer):
    words = {"path": files["words"], "prompt_column": "question"}
    config = config_of(files, **{"eval.data": {"math": files["math"], "words": words}, "eval.max_rows": 2})
    source = PromptSource.for_eval(config, plain_tokenizer, context_length=64)
    assert [(p.data_set, p.text) for p in map(source.prompt, range(source.num_rows))] == [
        ("math", "0+1="), ("math", "1+1="), ("words", "say 0"), ("words", "say 1")]
    with pytest.raises(UserError, match=r"an evaluation takes every prompt once"):
        read_sets(config_of(files, **{"eval.data": {"math": {"path": files["math"], "weight": 2}}}), EVAL)


def test_a_share_is_held_out_and_rows_of_one_prompt_stay_together(tmp_path, plain_tokenizer):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i % 50}+1=", "answer": str(i)} for i in range(200)]   # each prompt four times
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = from_dict({"data.train": str(file), "eval.share": 0.2, "rollout.max_tokens": 8})
    train, held = prompts(config, plain_tokenizer), PromptSource.for_eval(config, plain_tokenizer, context_length=64)
    texts = [{source.prompt(uid).text for uid in range(source.num_rows)} for source in (train, held)]
    assert not texts[0] & texts[1] and train.num_rows + held.num_rows == 200 and held.num_rows == 40
    again = PromptSource.for_eval(config, plain_tokenizer, context_length=64)
    assert [again.prompt(uid).row for uid in range(40)] == [held.prompt(uid).row for uid in range(40)]
    assert held.prompt(0).columns["answer"] == str(held.prompt(0).row)   # it knows its place in the file
    other = from_dict({"data.train": str(file), "eval.share": 0.2, "rollout.max_tokens": 8, "seed": 1})
    others = PromptSource.for_eval(other, plain_tokenizer, context_length=64)
    assert {others.prompt(uid).text for uid in range(40)} != texts[1]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_examples_and_pairs_mix_and_are_held_out_too(tmp_path, plain_tokenizer, kind):
    rows = [{"prompt": f"{i}=", "completion": "a", "chosen": "a", "rejected": "b"} for i in range(20)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [{**row, "prompt": "x" + row["prompt"]} for row in rows]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = {"one": str(tmp_path / "one.jsonl"), "two": {"path": str(tmp_path / "two.jsonl"), "weight": 3}}
    config = from_dict({"algo.name": kind, "data.train": sets, "eval.share": 0.25})
    make = {"sft": SftSource, "dpo": PairSource}[kind]
    train = make.from_config(config, plain_tokenizer, context_length=64)
    held = make.for_eval(config, plain_tokenizer, context_length=64)
    assert train.sizes == {"one": 15, "two": 15} and held.sizes == {"one": 5, "two": 5} and len(held.all()) == 10
    first = [item.token_ids if kind == "sft" else item.chosen_ids for item in train.batch(0, 1024)]
    assert sum(plain_tokenizer.decode(ids).startswith("x") for ids in first) == 768
    again = make.from_config(config, plain_tokenizer, context_length=64).batch(1, 512)
    ids = [item.token_ids if kind == "sft" else item.chosen_ids for item in again]
    assert all(np.array_equal(a, b) for a, b in zip(ids, first[512:], strict=True))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_curriculum_goes_by_recorded_pass_rates(plain_tokenizer, shuffle):
    rows = [{"prompt": f"{i}=", "pass_rate": rate} for i, rate in enumerate([0.0, 0.9, 0.5, 1.0, 0.9])]
    def order(curriculum):
        config = from_dict({"data.curriculum": curriculum, "data.shuffle": shuffle, "rollout.max_tokens": 8})
        source = PromptSource.from_config(config, plain_tokenizer, context_length=64, prompts=rows)
        return [[source.prompt(epoch * 5 + place).row for place in range(5)] for epoch in range(30)]

    easy = order(EASY_FIRST)
    assert all(epoch[0] == 3 and {*epoch[1:3]} == {1, 4} and epoch[3:] == [2, 0] for epoch in easy)
    assert (len(set(map(tuple, easy))) > 1) == shuffle
    unsure = order(UNSURE_FIRST)
    assert all({*epoch[3:]} == {0, 3} for epoch in unsure)   # no signal: last
    assert sum(epoch[0] == 2 for epoch in unsure) > (8 if shuffle else 29)
    assert order(UNSURE_FIRST) == unsure


def test_a_row_without_a_rate_is_as_unsure_as_can_be_and_is_told(plain_tokenizer):
    rows = [{"prompt": f"{i}=", "pass_rate": rate} for i, rate in enumerate([0.8, None, 0.1, 1.0])]
    config = from_dict({"data.curriculum": UNSURE_FIRST, "data.shuffle": False, "rollout.max_tokens": 8})
    source = PromptSource.from_config(config, plain_tokenizer, context_length=64, prompts=rows)
    assert [source.prompt(uid).row for uid in range(4)] == [1, 0, 2, 3]
    assert source.warnings() == ["prompts in memory: 1 of 4 rows have no pass rate: they count as 0.5"]
    with pytest.raises(UserError, match="column 'pass_rate' holds no rate"):
        PromptSource.from_config(config, plain_tokenizer, context_length=64,
                                 prompts=[{"prompt": "a", "pass_rate": None}])


@pytest.mark.parametrize("rate", ["0.5", -0.1, 1.5, True])
def test_a_pass_rate_is_a_number_from_0_to_1(plain_tokenizer, rate):
    config = from_dict({"data.curriculum": EASY_FIRST, "rollout.max_tokens": 8})
    rows = [{"prompt": "a", "pass_rate": 0.5}, {"prompt": "b", "pass_rate": rate}]
    with pytest.raises(UserError, match=r"row 2 \(from 1\): column 'pass_rate' must be a number from 0 to 1"):
        PromptSource.from_config(config, plain_tokenizer, context_length=64, prompts=rows)
    with pytest.raises(UserError, match=r"unknown column 'pass_rate'.*data\.pass_rate_column"):
        PromptSource.from_config(config, plain_tokenizer, context_length=64, prompts=["a"])


def test_draws_without_replacement_are_by_weight():
    rates = np.array([0.5] * 10 + [0.1] * 10)   # weights 1 and 0.36
    rng = np.random.default_rng(0)
    firsts = [by_pass_rate(UNSURE_FIRST, rates, rng.random(20))[0] for _ in range(4000)]
    assert abs(np.mean(np.array(firsts) < 10) - 1 / 1.36) < 0.03


def test_shares_sum_and_no_set_is_left_out():
    for weights in ([1], [1, 1], [3, 1], [1e-9, 1, 1e9], [0.1] * 7):
        counts = shares(weights, 1024)
        assert counts.sum() == 1024 and counts.min() >= 1
        exact = np.array(weights) / np.sum(weights) * 1024
        assert np.abs(counts - exact).max() <= len(weights)


def test_a_mixture_of_one_is_that_one():
    alone = EpochOrder(5, seed=3, shuffle=True)
    mixed = MixedOrder([EpochOrder(5, seed=3, shuffle=True)], [2.0], seed=3, shuffle=True)
    assert [mixed.row(i) for i in range(20)] == [alone.row(i) for i in range(20)]


def test_paths_are_changed_wherever_they_stand():
    given = {"a": "x", "b": {"path": ["y", "z"], "weight": 2}}
    assert map_paths(given, str.upper) == {"a": "X", "b": {"path": ["Y", "Z"], "weight": 2}}
    assert map_paths(None, str.upper) is None and map_paths(["x"], str.upper) == ["X"]
