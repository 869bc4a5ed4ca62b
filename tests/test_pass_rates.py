"""Pass rates out of the samples of runs and evaluations, and the file that a curriculum orders by."""

from __future__ import annotations

import doctest
import json
from pathlib import Path

import pytest

from flux_ray import __main__ as cli
from flux_ray import pass_rates
from flux_ray.config import from_dict
from flux_ray.data import PromptSource
from flux_ray.errors import UserError
from flux_ray.observability import rollouts
from tests.data.conftest import make_tokenizer
from tests.fakes.run_files import write_lines, write_run
from tests.observability.test_rollouts import rollout

pytestmark = pytest.mark.unit


@pytest.fixture
def run(tmp_path) -> Path:
    """Two steps of two groups of four: prompts 0+0= to 3+3=, of which each step's second was never right."""
    return write_run(tmp_path / "run=1", steps=2)


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "data.jsonl"
    write_lines(file, [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in (9, 2, 0, 1, 0)])
    return file


def rated(*words: object) -> list[dict]:
    """The rows that the command has written."""
    assert cli.main(["passrates", *map(str, words)]) == 0
    file = Path(str(words[words.index("-o") + 1]))
    return [json.loads(line) for line in file.read_text().splitlines()]


def refused(capsys, *words: object) -> str:
    assert cli.main(["passrates", *map(str, words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_the_examples_in_docstrings_hold():
    tried = doctest.testmod(pass_rates)
    assert tried.attempted and not tried.failed


def test_rows_get_the_share_of_samples_that_reached_the_level(run, data, tmp_path, capsys):
    out = tmp_path / "rated.jsonl"
    rows = rated(run, "-o", out, f"data={data}", "eval.pass_reward=0.5")   # rewards 0, ¼, ½, ¾ in the first step
    assert [(row["prompt"], row["pass_rate"]) for row in rows] == [
        ("9+9=", None), ("2+2=", 0.5), ("0+0=", 0.5), ("1+1=", 0.0), ("0+0=", 0.5)]
    assert [row["answer"] for row in rows] == ["18", "4", "0", "2", "0"]
    assert capsys.readouterr().out.splitlines() == [
        "16 samples of 4 prompts, right from a task reward of 0.5 on",
        f"{out}: 4 of 5 rows have a pass rate, 0.375 in the mean; 0 are always right, 1 never"]
    assert {row["pass_rate"] for row in rated(run, "-o", out, f"data={data}")} == {None, 0.0}   # 1 is the default


def test_runs_and_evaluations_count_together(run, data, tmp_path):
    evaluation = tmp_path / "later" / "evaluation"
    evaluation.mkdir(parents=True)
    write_lines(evaluation / "eval_samples.jsonl", [
        {"set": "", "row": 0, "prompt": "9+9=", "task_rewards": [1.0, None]},
        {"set": "", "row": 2, "prompt": "0+0=", "task_rewards": [1.0, 1.0, 1.0, 1.0]}])
    rows = rated(run, evaluation.parent, "-o", tmp_path / "rated.jsonl", f"data={data}", "eval.pass_reward=0.5")
    assert [row["pass_rate"] for row in rows] == [1.0, 0.5, 0.75, 0.0, 0.75]


def test_a_chat_is_found_again_and_read_as_the_run_read_it(run, tmp_path):
    """Whatever the order of a message's keys; a row that holds the reply was asked without it."""
    messages = [{"role": "user", "content": "ü?"}]
    rollouts.write(run, 7, [rollout(), rollout(6)])   # task rewards ½ and none
    rows = [{"prompt": [*messages, {"content": "So.", "role": "assistant"}]}, {"prompt": [{"role": "user",
                                                                                             "content": "u?"}]}]
    write_lines(tmp_path / "chats.jsonl", rows)
    written = rated(run, "-o", tmp_path / "rated.jsonl", f"data={tmp_path / 'chats.jsonl'}", "eval.pass_reward=0.5")
    assert [row["pass_rate"] for row in written] == [1.0, None] and written[0]["prompt"] == rows[0]["prompt"]


def test_each_of_several_sets_has_its_own_columns_and_file(run, tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"prompt": "2+2="}])
    write_lines(tmp_path / "b.jsonl", [{"question": "0+0=", "id": 7}])
    sets = f"data={{a: {tmp_path / 'a.jsonl'}, b: {{path: {tmp_path / 'b.jsonl'}, prompt_column: question}}}}"
    assert cli.main(["passrates", str(run), "-o", str(tmp_path / "of.jsonl"), sets, "eval.pass_reward=0.75"]) == 0
    found = [(tmp_path / f"of-{name}.jsonl").read_text() for name in "ab"]
    assert [json.loads(text) for text in found] == [
        {"prompt": "2+2=", "pass_rate": 0.25}, {"question": "0+0=", "id": 7, "pass_rate": 0.25}]


def test_the_file_orders_a_run(run, data, tmp_path):
    rated(run, "-o", tmp_path / "rated.jsonl", f"data={data}", "eval.pass_reward=0.25")
    config = from_dict({"data.train": str(tmp_path / "rated.jsonl"), "data.curriculum": "easy_first",
                        "data.shuffle": False, "rollout.max_tokens": 8})
    source = PromptSource.from_config(config, make_tokenizer(), context_length=64)
    assert [source.prompt(uid).text for uid in range(5)] == ["2+2=", "0+0=", "0+0=", "9+9=", "1+1="]


def test_what_cannot_be_is_told_in_a_line(run, data, tmp_path, capsys):
    out, given = tmp_path / "rated.jsonl", f"data={data}"
    assert "-o names the file" in refused(capsys, run)
    assert "ends in .jsonl" in refused(capsys, run, "-o", tmp_path / "rated.parquet")
    assert "there is no folder" in refused(capsys, run, "-o", tmp_path / "no/rated.jsonl")
    assert "the folder of a run is missing" in refused(capsys, "-o", out, given)
    assert "so no run" in refused(capsys, tmp_path / "gone", "-o", out, given)
    assert "data.train is not set" in refused(capsys, run, "-o", out)
    (tmp_path / "empty").mkdir()
    assert "neither rollouts with rewards nor samples" in refused(capsys, run, tmp_path / "empty", "-o", out, given)
    assert "no prompt in it is one that was sampled: data.prompt_column" in refused(
        capsys, run, "-o", out, given, "data.prompt_template='{prompt} think'")
    assert "unknown column 'question'" in refused(capsys, run, "-o", out, given, "data.prompt_column=question")
    (run / "config.yaml").write_text("algo: {name: sft}\n")
    assert "algo.name=sft samples nothing" in refused(capsys, run, "-o", out, given)
    assert not out.exists()
    with pytest.raises(UserError, match=r"Is a directory|can't"):
        (tmp_path / "folder.jsonl").mkdir()
        list(pass_rates.write_rated(from_dict({"data.train": str(data)}), tallied(run), tmp_path / "folder.jsonl"))


def tallied(run: Path) -> pass_rates.Tally:
    tally = pass_rates.Tally(1.0)
    tally.add_run(run)
    return tally
