"""docs/metrics.md names what is measured; the tests of whole runs hold what they write against it."""

from __future__ import annotations

import pytest

from flux_ray import algo
from flux_ray.algo import preferences
from flux_ray.backends.trl import METRICS as OF_TRL
from flux_ray.driver.drop_stats import CAUSES
from tests.house.documented import names, undocumented

pytestmark = pytest.mark.unit


def test_every_formula_s_name_is_on_the_page():
    written = [*algo.METRICS, *preferences.METRICS, *OF_TRL.values()]
    written += [f"filter/{what}_{cause}" for what in ("dropped", "rate", "length") for cause in CAUSES]
    assert undocumented(written) == []


def test_what_is_not_on_the_page_is_seen():
    assert undocumented(["step", "reward/mine", "reward/mine/part", "actor/loss"]) == []
    unknown = ["actor/los", "nothing/at_all", "reward/a/b/c"]
    assert undocumented(unknown) == unknown


def test_the_page_says_nothing_twice():
    assert len(names()) == len(set(names()))
