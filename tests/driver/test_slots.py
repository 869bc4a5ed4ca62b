"""The slots by their promises: no slot twice, oldest first, the bound never passed, over-sampling changes no batch."""

from __future__ import annotations

import math
import random

import pytest
from flux_ray.driver.slots import Slots

pytestmark = pytest.mark.unit


def start(slots: Slots, *uids: int, version: int = 0) -> None:
    for uid in uids:
        slots.reserve(uid, version=version)


def test_a_synchronous_step_waits_for_all_and_takes_them_in_order():
    slots = Slots(prompts_per_step=3, max_staleness=0)
    start(slots, 0, 1, 2)
    assert not slots.has_room(version=0)
    for uid in (2, 0):
        slots.ready(uid, uid)
    assert slots.take(version=0) is None
    slots.ready(1, 1)
    assert slots.take(version=0).groups == [0, 1, 2]
    assert not slots.has_room(version=0), "a slot is held until the new weights are served"
    slots.release()
    assert slots.has_room(version=1)


def test_a_dropped_group_frees_its_slot():
    slots = Slots(prompts_per_step=2, max_staleness=0)
    start(slots, 0, 1)
    slots.drop(0, version=0)
    assert slots.has_room(version=0)
    assert slots.in_flight == [1]


def test_in_flight_are_the_prompts_that_a_resume_must_start_again():
    slots = Slots(prompts_per_step=1, max_staleness=2)
    start(slots, 5, 6, 7)
    slots.ready(6, 6)
    assert slots.take(version=0).groups == [6]
    slots.release()
    assert slots.in_flight == [5, 7]


@pytest.mark.parametrize(("max_staleness", "oversample"), [(0, 0.0), (2, 0.0), (0, 1.5)])
def test_no_prompt_starts_that_no_step_is_left_for(max_staleness, oversample):
    slots = Slots(prompts_per_step=2, max_staleness=max_staleness, oversample=oversample, num_steps=3)
    started = trained = 0
    for version in range(3):
        new = []
        while slots.has_room(version=version):
            slots.reserve(started, version=version)
            new.append(started)
            started += 1
        for uid in new:
            slots.ready(uid, uid)
        trained += len(slots.take(version=version).groups)
        slots.release()
    assert (trained, started) == (6, 6 if not oversample else 3 * (2 + 3)), "three spares a step, and no more"
    assert not slots.has_room(version=3)


def test_the_trainer_waits_for_the_group_that_would_pass_the_bound():
    slots = Slots(prompts_per_step=1, max_staleness=1)
    start(slots, 0, 1)
    slots.ready(1, "newer")
    assert slots.take(version=0).groups == ["newer"]   # 0 can still be in the next one
    slots.release()
    start(slots, 2, version=1)
    slots.ready(2, "newest")
    assert slots.take(version=1) is None, "group 0, born at version 0, must be trained on at version 1"
    slots.ready(0, "oldest")
    assert slots.take(version=1).groups == ["oldest"]


def test_a_prompt_that_starts_in_a_step_can_be_trained_on_in_time():
    """While version 0 is trained on, the slots of its batch are not there: the newcomers are born at version 0."""
    slots = Slots(prompts_per_step=2, max_staleness=1)
    start(slots, 0, 1, 2, 3)
    for uid in (0, 1):
        slots.ready(uid, uid)
    assert slots.take(version=0).groups == [0, 1]
    slots.drop(3, version=0)
    assert slots.has_room(version=0)
    start(slots, 4)
    assert not slots.has_room(version=0)


def test_spares_take_the_place_of_dropped_groups_and_the_rest_start_again():
    slots = Slots(prompts_per_step=3, max_staleness=0, oversample=0.6)
    start(slots, 0, 1, 2, 3, 4)
    assert not slots.has_room(version=0)
    for uid in (0, 4):
        slots.ready(uid, uid)
    slots.drop(1, version=0)
    assert slots.has_room(version=0), "3 has moved up, and another spare may start"
    slots.ready(3, 3)
    assert slots.take(version=0) is None, "2 comes before 4, whoever is faster"
    slots.ready(2, 2)
    taken = slots.take(version=0)
    assert (taken.groups, taken.surplus, taken.unused) == ([0, 2, 3], [4], [4])
    assert not slots.has_room(version=0), "no spare without anybody to stand in for"
    slots.release()
    assert slots.in_flight == []


def test_a_refused_spare_counts_only_when_its_turn_comes():
    slots = Slots(prompts_per_step=2, max_staleness=0, oversample=1.0)
    start(slots, 0, 1, 2, 3)
    slots.drop(2, version=0)
    assert slots.in_flight == [0, 1, 2, 3]
    assert slots.has_room(version=0), "it stands in for nobody: another spare may start"
    slots.drop(1, version=0)
    assert slots.in_flight == [0, 3], "its turn came, and went"
    slots.ready(0, 0)
    slots.ready(3, 3)
    assert slots.take(version=0).groups == [0, 3]


@pytest.mark.parametrize(("oversample", "spares"), [(0.0, 0), (0.4, 1), (1.0, 1), (2.5, 3)])
def test_spares_are_drawn_for_groups_that_may_yet_be_dropped(oversample, spares):
    slots = Slots(prompts_per_step=3, max_staleness=0, oversample=oversample)
    start(slots, 0, 1, 2)
    for uid in (0, 1):
        slots.ready(uid, uid)
    for uid in range(3, 3 + spares):
        start(slots, uid)
    assert not slots.has_room(version=0)
    slots.ready(2, 2)
    taken = slots.take(version=0)
    assert (taken.surplus, taken.unused) == ([*range(3, 3 + spares)], []), "none of them was finished"


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_asynchronous_runs_draw_no_spare_that_could_only_be_thrown_away(max_staleness):
    slots = Slots(prompts_per_step=2, max_staleness=max_staleness, oversample=3.0)
    started = 0
    for version in range(10):
        new = []
        while slots.has_room(version=version):
            start(slots, started, version=version)
            new.append(started)
            started += 1
        assert len(slots.in_flight) == 2 * (1 + max_staleness), "all of them run"
        for uid in new:
            slots.ready(uid, uid)
        assert slots.take(version=version).surplus == []
        slots.release()
    assert started == 2 * (10 + max_staleness), "each of them is trained on in time"


def test_a_finished_spare_stands_in_for_one_and_fewer_are_drawn():
    slots = Slots(prompts_per_step=4, max_staleness=0, oversample=2.0)
    start(slots, *range(4 + 8))
    assert not slots.has_room(version=0)
    for uid in (0, 1, 2, 4, 5):
        slots.ready(uid, uid)
    assert not slots.has_room(version=0), "two are there for the one that the batch waits for"
    slots.drop(3, version=0)
    assert slots.take(version=0).groups == [0, 1, 2, 4]


def test_a_spare_is_told_as_such_and_counts_as_dropped_when_its_turn_comes():
    slots = Slots(prompts_per_step=2, max_staleness=0, oversample=1.0)
    assert [slots.reserve(uid, version=0) for uid in range(4)] == [False, False, True, True]
    assert slots.drop(2, version=0) == 0
    assert slots.drop(0, version=0) == 2, "itself, and 2, which has moved up"
    assert slots.drop(3, version=0) == 1


@pytest.mark.parametrize("oversample", [0, 0.5, 1.5])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_the_bound_holds_and_nothing_stalls_whatever_the_order(max_staleness, oversample):
    for seed in range(50):
        run_randomly(Slots(4, max_staleness, oversample), random.Random(seed), num_steps=12)
        run_randomly(Slots(4, max_staleness, oversample), random.Random(seed), num_steps=12, at_least=seed % 4)


def test_a_step_may_be_taken_in_parts_and_not_one_token_too_early():
    slots = Slots(prompts_per_step=4, max_staleness=0)
    start(slots, 0, 1, 2, 3)
    slots.ready(2, 2, num_tokens=60)
    assert slots.take(version=0, at_least=100) is None
    slots.ready(1, 1, num_tokens=60)
    part = slots.take(version=0, at_least=100)
    assert (part.groups, part.complete) == ([1, 2], False)
    slots.ready(0, 0, num_tokens=10)
    assert slots.take(version=0, at_least=100) is None
    assert not slots.has_room(version=0), "slots are held until the new weights are served"
    slots.ready(3, 3, num_tokens=10)
    part = slots.take(version=0, at_least=100)
    assert (part.groups, part.complete) == ([0, 3], True), "the rest, however small"


def test_no_part_is_taken_that_would_make_another_group_pass_the_bound():
    slots = Slots(prompts_per_step=2, max_staleness=1)
    start(slots, 0, 1, 2, 3)
    for uid in (2, 3):
        slots.ready(uid, uid, num_tokens=1)
    assert slots.take(version=0, at_least=1).groups == [2, 3]
    slots.release()
    start(slots, 4, 5, version=1)
    for uid in (4, 5):
        slots.ready(uid, uid, num_tokens=1)
    assert slots.take(version=1, at_least=1) is None, "0 and 1, born at version 0, must be trained on at version 1"
    slots.ready(1, 1, num_tokens=1)
    assert slots.take(version=1, at_least=1).groups == [1]
    slots.ready(0, 0, num_tokens=1)
    assert slots.take(version=1, at_least=1).complete


def test_parts_and_spares_give_the_synchronous_batch():
    for seed in range(30):
        batches = [run_randomly(Slots(4, 0, oversample), random.Random(1000 * seed + int(4 * oversample)), num_steps=12,
                                bad=seed, at_least=at_least)
                   for oversample, at_least in ((0, math.inf), (0.75, 1), (2, 2))]
        assert [sorted(b) for b in batches[0]] == [sorted(b) for b in batches[1]] == [sorted(b) for b in batches[2]]


def test_over_sampling_changes_no_synchronous_batch():
    for seed in range(30):
        batches = [run_randomly(Slots(4, 0, oversample), random.Random(1000 * seed + int(4 * oversample)), num_steps=12,
                                bad=seed) for oversample in (0, 0.75, 2)]
        assert batches[0] == batches[1] == batches[2]


def run_randomly(
    slots: Slots, chance: random.Random, num_steps: int, bad: int = 0, at_least: float = math.inf,
) -> list[list[int]]:
    """Groups of one token each finish in a random order, some are refused (by uid and version). Gives the batches."""
    version, next_uid, running, born, restart = 0, 0, [], {}, []
    batches: list[list[int]] = [[]]
    while version < num_steps:
        while slots.has_room(version=version):
            uid = restart.pop(0) if restart else next_uid
            next_uid += uid == next_uid
            slots.reserve(uid, version=version)
            running.append(uid)
            born[uid] = version
        taken = slots.take(version=version, at_least=at_least)
        if taken is None:
            assert running, "nothing runs and nothing can be taken: a deadlock"
            finish(slots, running, chance, version, bad)
            continue
        assert taken.complete or len(taken.groups) >= at_least
        assert all(version - born[uid] <= slots.max_staleness for uid in taken.groups)
        assert not {uid for batch in batches for uid in batch} & set(taken.groups)
        assert slots.max_staleness == 0 < slots.oversample or not taken.surplus, "nothing is thrown away for the bound"
        batches[-1] += taken.groups
        running = [uid for uid in running if uid not in taken.surplus]
        restart = taken.surplus + restart
        for _ in range(chance.randrange(3)):   # some end while the step trains
            finish(slots, running, chance, version, bad)
        if taken.complete:
            assert len(batches[-1]) == slots.prompts_per_step
            slots.release()
            batches.append([])
            version += 1
    return batches


def finish(slots: Slots, running: list[int], chance: random.Random, version: int, bad: int) -> None:
    if not running:
        return
    uid = running.pop(chance.randrange(len(running)))
    if random.Random(f"{bad} {uid} {version if slots.max_staleness == 0 else 0}").random() < 0.3:
        slots.drop(uid, version=version)
    else:
        slots.ready(uid, uid, num_tokens=1)
