"""The table of what was learned, from runs' evaluations."""

from __future__ import annotations

import pytest

from flux_ray.learn import ACCURACY, learned, table

pytestmark = pytest.mark.unit


def evaluations(*scores):
    return [{"step": 5 * i, ACCURACY: score} for i, score in enumerate(scores)]


def test_steps_are_to_the_first_evaluation_at_the_level():
    assert learned("grpo", 0, evaluations(0.5, 0.79, 0.8, 0.7, 0.9)).steps == 10
    assert learned("grpo", 0, evaluations(0.85)).steps == 0


def test_a_run_that_did_not_get_there_says_so():
    result = learned("gspo", 1, evaluations(0.5, 0.6, 0.55))
    assert result.steps is None and result.best == 0.6 and result.note == "not in 10 steps"
    assert learned("gspo", 1, []).note.startswith("no evaluation")


def test_a_line_for_each_algorithm_a_column_for_each_seed():
    results = [learned("grpo", 0, evaluations(0.5, 0.9)), learned("grpo", 1, evaluations(0.5, 0.6, 0.8)),
               learned("gspo", 0, evaluations(0.5, 0.6))]
    head, grpo, gspo = table(results).splitlines()
    assert head.split()[-4:] == ["seed", "0", "seed", "1"]
    assert grpo.split() == ["grpo", "5", "10"]
    assert gspo.split()[:3] == ["gspo", "best", "0.60"] and gspo.endswith("not in 5 steps")
