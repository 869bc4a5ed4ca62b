"""The table of what was learned, from runs' evaluations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.learn import ACCURACY, EVAL, LEVEL, TABLE, learn, learned, main, table
from flux_ray import algo
from flux_ray.__main__ import compose

pytestmark = pytest.mark.unit


def evaluations(*scores):
    return [{"step": 5 * i, ACCURACY: score} for i, score in enumerate(scores)]


def test_steps_are_to_the_first_evaluation_at_the_level():
    assert learned("grpo", 0, evaluations(0.5, 0.79, 0.8, 0.7, 0.9)).steps == 10
    assert learned("grpo", 0, evaluations(0.85)).steps == 0


def test_a_run_that_did_not_get_there_says_so():
    result = learned("gspo", 1, evaluations(0.5, 0.6, 0.55))
    assert result.steps is None and result.best == 0.6 and result.note == "not in 10 steps"
    assert learned("gspo", 1, evaluations(0.5, 0.6), ended=False).note == "seed 1: no further than step 5"
    assert learned("gspo", 1, []).note == "seed 1: no evaluation, see its run.log"


def test_a_line_for_each_algorithm_a_column_for_each_seed():
    results = [learned("grpo", 0, evaluations(0.5, 0.9)), learned("grpo", 1, evaluations(0.4, 0.6, 0.8)),
               learned("dapo", 0, evaluations(0.5, 0.6)), learned("dapo", 1, [])]
    head, grpo, dapo, before = table(results).splitlines()
    assert head.split()[-4:] == ["seed", "0", "seed", "1"]
    assert grpo.split() == ["grpo", "5", "10"]
    assert dapo.split()[:3] == ["dapo", "best", "0.60"] and dapo.endswith("not in 5 steps; seed 1: no evaluation, "
                                                                          "see its run.log")
    assert before.split()[-2:] == ["0.50", "0.40"]


@pytest.fixture
def runs():
    """A command line that is noted: grpo reaches the level, dapo breaks before its model is there."""
    class Runs(list):
        def __call__(self, arguments: list[str]) -> int:
            given = dict(argument.partition("=")[::2] for argument in arguments)
            folder = Path(given["run_dir"])
            self.append(folder.name)
            folder.mkdir(parents=True)
            (folder / EVAL).write_text("".join(json.dumps(e) + "\n" for e in evaluations(0.5, LEVEL)))
            if not folder.name.startswith("dapo"):
                (folder / "model").mkdir()
            return 0

    return Runs()


def test_a_run_that_is_done_is_not_done_again(tmp_path, runs, capsys):
    """The table is there after each run; one that broke off is run again, and a seed that is new."""
    learn(tmp_path, ["grpo", "dapo"], [0], options=[], run=runs)
    assert runs == ["warm-up", "grpo-0", "dapo-0"]
    assert capsys.readouterr().out.count("steps to 0.8") == 2
    learn(tmp_path, ["grpo", "dapo"], [0, 1], options=[], run=runs)
    assert runs[3:] == ["dapo-0", "warm-up", "grpo-1", "dapo-1"]
    written = (tmp_path / TABLE).read_text()
    assert main(["--folder", str(tmp_path), "--table"]) == 0
    assert written in capsys.readouterr().out and (tmp_path / TABLE).read_text() == written


@pytest.mark.parametrize("words, message", [
    (["--algorithms", "grop"], "unknown algorithm 'grop': did you mean 'grpo'?"),
    (["--seeds", "a"], "--seeds"),
    (["--table", "--folder", "/no/such"], "--table needs --folder with runs in it"),
])
def test_refused(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", algo.ALGORITHMS)
def test_the_experiment_of_each_algorithm_is_one_that_can_run(name):
    from flux_ray.algo.check import check

    seen = []
    compose([f"algo={name}", "experiment=addition", "model.path=m", "data.train=d"], then=seen.append)
    (config,) = seen
    assert config.algo.name == name and config.reward.functions == ["exact_match"]
    assert not check(config)
