"""The slots by their promises: no slot twice, oldest first, the staleness bound never passed."""

import random

import pytest

from flux_ray.driver.slots import Slots

pytestmark = pytest.mark.unit


def test_a_synchronous_step_waits_for_all_and_takes_them_in_order():
    slots = Slots(prompts_per_step=3, max_staleness=0)
    for uid in range(3):
        slots.reserve(uid, version=0)
    assert slots.free == 0
    for uid in (2, 0):
        slots.ready(uid, uid)
    assert slots.take(version=0) is None
    slots.ready(1, 1)
    assert slots.take(version=0) == [0, 1, 2]
    assert slots.free == 0, "a slot is held until the new weights are served"
    slots.release()
    assert slots.free == 3


def test_a_dropped_group_frees_its_slot():
    slots = Slots(prompts_per_step=2, max_staleness=0)
    slots.reserve(0, version=0)
    slots.reserve(1, version=0)
    slots.drop(0)
    assert slots.free == 1
    assert slots.in_flight == [1]


def test_in_flight_are_the_prompts_that_a_resume_must_start_again():
    slots = Slots(prompts_per_step=1, max_staleness=2)
    for uid in (5, 6, 7):
        slots.reserve(uid, version=0)
    slots.ready(6, 6)
    assert slots.take(version=0) == [6]
    slots.release()
    assert slots.in_flight == [5, 7]


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_the_bound_holds_and_nothing_stalls_whatever_the_order(max_staleness):
    for seed in range(200):
        run_randomly(Slots(prompts_per_step=4, max_staleness=max_staleness), random.Random(seed), num_steps=12)


def run_randomly(slots, chance, num_steps):
    """Groups finish, and some are dropped, in a random order; a group's oldest version is the one it started at."""
    version, next_uid, running, born = 0, 0, [], {}
    trained = set()
    while version < num_steps:
        while slots.free:
            slots.reserve(next_uid, version=version)
            running.append(next_uid)
            born[next_uid] = version
            next_uid += 1
        batch = slots.take(version=version)
        if batch is not None:
            assert len(batch) == slots.prompts_per_step
            assert all(version - born[uid] <= slots.max_staleness for uid in batch)
            assert not trained & set(batch)
            trained |= set(batch)
            slots.release()
            version += 1
            continue
        assert running, "nothing runs and nothing can be taken: a deadlock"
        uid = running.pop(chance.randrange(len(running)))
        if chance.random() < 0.2:
            slots.drop(uid)
        else:
            slots.ready(uid, uid)
