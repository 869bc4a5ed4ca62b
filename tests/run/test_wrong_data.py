"""Data that an objective can't learn from are refused by name before anything starts; what is left out is told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flux_ray.config import OFFLINE, GroupsConfig, from_dict, preset
from flux_ray.data import GroupSource, PairSource, SftSource
from flux_ray.errors import UserError
from flux_ray.offline.data import OfflineData
from flux_ray.run.prepare import Prepared, prepare
from tests.tiny import tiny_model

pytestmark = pytest.mark.unit

START = "\n\nHuman: hi\n\nAssistant:"
PROMPTS = [{"prompt": "1+1=", "answer": "2"}]
PAIRS = [{"chosen": f"{START} a", "rejected": f"{START} b"}, {"chosen": f"{START} c", "rejected": START}]
GROUPS = [{"prompt": "1+1=", "responses": ["2", "3"], "rewards": [1.0, 0.0]}]
COMPLETIONS = [{"prompt": "1+1=", "completion": "2"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model") / "model", tied=True, context=64)


@pytest.fixture
def prepared(model, tmp_path):
    def make(algorithm: str, rows: list[dict[str, Any]], **options: Any) -> Prepared:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        shorter = {"rollout.max_tokens": 8} if algorithm not in OFFLINE else {}
        return prepare(from_dict({**preset(algorithm), "model.path": str(model), "data.train": str(file), **shorter,
                                  **options}))

    return make


@pytest.mark.parametrize(("algorithm", "rows", "message"), [
    ("dpo", PROMPTS, "algo.name=dpo learns from preference pairs: no column 'chosen'"),
    ("reward_model", GROUPS, "algo.name=reward_model learns from preference pairs: no column 'chosen'"),
    ("ipo", COMPLETIONS, "(columns: prompt, completion)"),
    ("sft", PAIRS, "preference pairs (chosen, rejected) are for algo=dpo, ipo, cdpo or reward_model"),
    ("sft", PROMPTS, "nothing to learn from: no column 'completion'"),
    ("grpo", PAIRS[:1], "holds preference pairs (chosen, rejected), of which algo.name=grpo reads the prompts alone"),
    ("ppo", PAIRS[:1], "and reward.functions names nothing that scores what it samples"),
    ("ppo", [{"prompt": "1+1="}], "no reward: reward.functions is empty"),
    ("grpo", COMPLETIONS, "no reward"),
    ("grpo", [{"chosen": "x", "rejected": "y"}], "share no text up to a reply"),
    ("grpo", [{**GROUPS[0], "rewards": [1.0]}], "row 1 (from 1): column 'rewards': 1 rewards for 2 responses"),
])
def test_the_wrong_kind_of_data(prepared, algorithm, rows, message):
    with pytest.raises(UserError) as caught:
        prepared(algorithm, rows)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_evaluated_must_be_of_the_same_kind(prepared, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps(PROMPTS[0]) + "\n")
    with pytest.raises(UserError, match=r"eval\.jsonl: algo\.name=dpo learns from preference pairs"):
        prepared("dpo", PAIRS, **{"eval.data": str(tmp_path / "eval.jsonl")})


@pytest.mark.parametrize(("algorithm", "rows", "kind", "asks"), [
    ("dpo", PAIRS, PairSource, True), ("reward_model", PAIRS, PairSource, False),
    ("sft", COMPLETIONS, SftSource, False), ("grpo", GROUPS, GroupSource, True), ("rloo", GROUPS, GroupSource, True),
    ("dr_grpo", GROUPS, GroupSource, False), ("dapo", GROUPS, GroupSource, False),
])
def test_the_right_kind_needs_no_engine(prepared, algorithm, rows, kind, asks):
    got = prepared(algorithm, rows)
    assert isinstance(got.task, OfflineData) and isinstance(got.task.train, kind)
    assert got.needs_reference == asks
    if kind is GroupSource:
        assert isinstance(got.config, GroupsConfig) and got.config.rollout.group_size == 2


def test_pairs_left_out_and_columns_that_nobody_reads_are_told(prepared):
    rows = [{**row, "margin": 1.0} for row in PAIRS]
    first, second = prepared("dpo", rows).warnings
    assert first.endswith("data.jsonl: pairs left out: 1 empty")
    assert "column 'margin' is read by algo=reward_model alone" in second
    assert len(prepared("reward_model", rows).warnings) == 1


def test_pairs_whose_prompts_alone_are_read_are_told(prepared):
    (warning,) = prepared("grpo", PAIRS[:1], **{"reward.functions": ["length"]}).warnings
    assert "reads the prompts alone (dpo, ipo, cdpo, reward_model learn from pairs)" in warning


def test_a_context_too_short_for_a_pair(prepared):
    with pytest.raises(UserError, match=r"row 1 \(from 1\): column 'chosen': 26 tokens, more than the context of 20"):
        prepared("dpo", PAIRS, **{"rollout.max_model_len": 20})


def test_each_set_has_what_its_own_rewards_need(prepared, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"prompt": "say 1"}\n')
    math = {"path": str(tmp_path / "data.jsonl"), "rewards": ["numeric"]}
    words = {"path": str(tmp_path / "words.jsonl"), "rewards": ["length"]}
    options = {"reward.functions": ["numeric", "length"], "reward.options": {"length": {"target": 4}}}
    task = prepared("grpo", PROMPTS, **options, **{"data.train": {"math": math, "words": words}}).task
    assert {task.train.prompt(uid).rewards for uid in range(20)} == {("numeric",), ("length",)}
    with pytest.raises(UserError, match="numeric needs unknown column 'answer'"):
        prepared("grpo", PROMPTS, **options, **{"data.train": {"math": math, "words": words["path"]}})


def test_a_share_of_one_file_is_evaluated_on(prepared):
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(10)]
    task = prepared("grpo", rows, **{"eval.share": 0.3, "eval.every": 1}).task
    assert (task.train.num_rows, task.evaluation.num_rows) == (7, 3)
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(10)]
    task = prepared("sft", rows, **{"eval.share": 0.3, "eval.every": 1}).task
    assert (task.train.num_rows, task.evaluation.num_rows) == (7, 3)


def test_groups_of_several_sets_and_a_share_of_them_are_refused(prepared, tmp_path):
    (tmp_path / "more.jsonl").write_text(json.dumps(GROUPS[0]) + "\n")
    sets = {"a": str(tmp_path / "data.jsonl"), "b": str(tmp_path / "more.jsonl")}
    with pytest.raises(UserError, match="groups with given rewards are of one set, but it names 2"):
        prepared("grpo", GROUPS, **{"data.train": sets})
    with pytest.raises(UserError, match=r"eval\.share=0\.5: it needs engines"):
        prepared("grpo", [{**GROUPS[0], "prompt": f"{i}="} for i in range(4)], **{"eval.share": 0.5})
