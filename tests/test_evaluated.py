"""The words of `flux-ray eval`, and what it tells of two models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flux_ray.errors import UserError
from flux_ray.evaluated import Evaluation, as_json, difference, told, words

pytestmark = pytest.mark.unit


def evaluation(name: str, rewards: dict[int, list[float | None]]) -> Evaluation:
    answers = [{"row": row, "prompt": "?", "completion": "!", "reward": 0.0, "task_rewards": values}
               for row, values in rewards.items()]
    return Evaluation(name, Path("folder") / name, {"eval/task_mean": 0.5, "eval/task_mean_low": 0.25,
                                                    "eval/task_mean_high": 0.75, "eval/prompts": 4.0}, answers)


def test_short_words():
    asked = words(["model=m", "data=d.jsonl", "--against", "base", "eval.num_samples=4", "--json", "out.json"])
    assert asked.overrides == ["model.path=m", "eval.data=d.jsonl", "eval.num_samples=4"]
    assert (asked.against, asked.json_file) == ("base", Path("out.json"))


def test_a_run_s_folder_stands_for_its_model_and_options(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="this run has no model yet: flux-ray checkpoint export"):
        words([f"model={tmp_path}"])
    (tmp_path / "model").mkdir()
    assert words([f"model={tmp_path}"]).overrides == [f"resume={tmp_path}", f"model.path={tmp_path / 'model'}"]


def test_wrong_words():
    with pytest.raises(UserError, match="--against"):
        words(["--against"])


def test_two_models_are_compared_on_what_both_answered():
    before = evaluation("base", {0: [0, 0], 1: [1, 0], 2: [0, None], 9: [1]})
    after = evaluation("trained", {0: [1, 1], 1: [1, 1], 2: [0, 0], 3: [1], 4: [None]})
    by = difference(after, before)
    assert by["mean"] == pytest.approx((1 + 0.5 + 0) / 3) and by["prompts"] == 3
    assert (by["better"], by["worse"]) == (2, 0) and by["low"] <= by["mean"] <= by["high"]
    lines = "\n".join(told([after, before]))
    assert "paired over 3 prompts: +0.5" in lines and "left: base; right: trained" in lines
    assert "95 %: 0.25 to 0.75" in lines and "task_mean_low" not in lines
    values = json.loads(as_json([after, before]))
    assert values["difference"] == by and values["against"]["model"] == "base"


def test_one_model_alone_and_answers_without_rewards():
    alone = evaluation("m", {})
    assert "difference" not in "\n".join(told([alone])) and "against" not in json.loads(as_json([alone]))
    assert difference(alone, alone) == {}
