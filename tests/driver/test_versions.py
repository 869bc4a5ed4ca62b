"""A version counts publishes and never goes back; a step may."""

from __future__ import annotations

import pytest

from flux_ray.driver.versions import Versions

pytestmark = pytest.mark.unit


def test_a_new_run_begins_with_version_0():
    versions = Versions(max_staleness=0)
    assert versions.highest == -1
    assert [versions.publish(step) for step in (0, 1, 2)] == [0, 1, 2] and versions.highest == 2
    assert versions.holding(2) == (2,) and versions.step_of(2) == 2


def test_a_resumed_run_publishes_above_all_versions_of_before():
    versions = Versions(max_staleness=0, highest=11)
    assert versions.publish(4) == 12
    assert versions.step_of(12) == 4 and versions.holding(4) == (12,)


def test_a_run_that_goes_back_to_a_step_never_reuses_a_version():
    versions = Versions(max_staleness=1)
    published = [versions.publish(step) for step in (0, 1, 2, 1, 2, 3)]
    assert published == [0, 1, 2, 3, 4, 5], "each of them is another"
    assert versions.holding(1) == (1, 3) and versions.holding(2) == (2, 4) and versions.holding(3) == (5,)
    assert [versions.step_of(version) for version in published] == [0, 1, 2, 1, 2, 3]


@pytest.mark.parametrize("max_staleness", [0, 1, 4])
def test_what_a_token_may_have_is_known_and_older_versions_are_forgotten(max_staleness):
    """The groups of a step are measured once the next one is published."""
    versions, most = Versions(max_staleness=max_staleness, highest=99), 0
    for step in range(50):
        versions.publish(step)
        for trained in (step, step - 1):
            for held in range(max(0, trained - max_staleness), trained + 1):
                (version,) = versions.holding(held)
                assert versions.step_of(version) == held
        most = max(most, sum(len(versions.holding(held)) for held in range(step + 1)))
    assert most <= 2 * (max_staleness + 1) + 1
    assert versions.holding(0) == ()
