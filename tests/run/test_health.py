"""A metric that leaves its range is told of once an episode; what a name means, and how it is told."""

from __future__ import annotations

import pytest

from flux_ray.errors import UserError
from flux_ray.metrics import command
from flux_ray.observability.described import Range
from flux_ray.run import catalogue
from flux_ray.run.health import Health

pytestmark = pytest.mark.unit


def told(name: str, values: list[float | None]) -> list[str]:
    said: list[str] = []
    health = Health(said.append)
    for step, value in enumerate(values):
        health.after(step + 1, {} if value is None else {name: value})
    return said


def test_an_episode_is_told_once_with_what_to_do_and_where_it_is_explained():
    low = 0.001
    (first, second) = told("actor/entropy", [1.0, *[low] * 9, 1.0, *[low] * 4, 1.0, *[low] * 5])
    assert first.startswith("step 6: actor/entropy is 0.001, below 0.01 for 5 steps in a row: nothing is explored")
    assert "`" not in first
    assert first.endswith("(docs/metrics.md, The policy)")
    assert second.startswith("step 21: ")


def test_steps_that_measure_nothing_and_values_on_the_edge():
    assert told("reward/same_frac", [1.0, None, 1.0, 1.0, None, 1.0]) == []
    assert len(told("reward/same_frac", [1.0, None, 1.0, 1.0, None, 1.0, 1.0])) == 1
    assert told("reward/same_frac", [0.95] * 9) == told("actor/entropy", [float("nan")] * 9) == []


@pytest.mark.parametrize(("name", "value"), [
    ("actor/grpo_kl", 2.0), ("actor/reward_kl", 200.0), ("actor/entropy", 0.0), ("reward/same_frac", 1.0),
    ("rollout/truncated_frac", 0.9), ("driver/staleness_mean", 6.0), ("actor/old_kl", -0.3), ("actor/ratio_mean", 3.0),
])
def test_what_goes_wrong_most_often_is_told(name, value):
    (line,) = told(name, [value] * 9)
    assert name in line and "docs/metrics.md" in line


def test_every_metric_is_described_once_and_says_what_to_do_where_it_warns():
    assert len({one.name for one in catalogue.ALL}) == len(catalogue.ALL)
    assert [one.name for one in catalogue.ALL if not one.formula] == []
    assert [one.name for one in catalogue.ALL if isinstance(one.healthy, Range) and not one.otherwise] == []


def test_a_name_finds_its_own_entry_before_one_with_a_placeholder():
    names = ("reward/mean", "reward/mine", "reward/mine/part", "filter/rate_unscored", "eval/mean", "eval/a/mean",
             "nothing")
    found = {name: getattr(catalogue.find(name), "name", None) for name in names}
    assert found == {
        "reward/mean": "reward/mean", "reward/mine": "reward/NAME", "reward/mine/part": "reward/NAME/PART",
        "filter/rate_unscored": "filter/rate_CAUSE", "eval/mean": "eval/mean", "eval/a/mean": "eval/NAME/PART",
        "nothing": None}


def test_the_command_prints_all_a_group_or_one(capsys):
    command([])
    shown = capsys.readouterr().out
    assert all(one.name in shown for one in catalogue.ALL)
    command(["actor/entropy"])
    one = capsys.readouterr().out
    assert one.startswith("actor/entropy\n  is ") and "≥ 0.01" in one and "`" not in one
    command(["critic"])
    assert capsys.readouterr().out.count("\n  is ") == 11
    with pytest.raises(UserError, match=r"unknown metric 'actor/entropi/x'.*did you mean 'actor/entropy'"):
        command(["actor/entropi/x"])
    with pytest.raises(UserError, match="one NAME at most"):
        command(["a", "b"])
