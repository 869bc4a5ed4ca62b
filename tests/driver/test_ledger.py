"""The ledger by its promises: no slot twice, oldest first, the bound never passed, over-sampling changes no batch.

What is lost with a worker or a rank starts again at its place.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from flux_ray.config import BatchConfig, FilterConfig, PolicyGradientConfig, RolloutConfig
from flux_ray.driver.drop_stats import DropStats
from flux_ray.driver.entry import NOBODY, Entry, State
from flux_ray.driver.ledger import Ledger
from flux_ray.driver.staleness import Bound
from flux_ray.messages import GroupAt, GroupReady
from flux_ray.records import ScoredGroup

pytestmark = pytest.mark.unit

NO_LIMIT = 10_000  # batches that a step may draw
NUM_WORKERS = 3
ONE = np.ones(1)


class Spent(DropStats):
    """Notes how many groups' turns came with each that was dropped."""

    def __init__(self, config: PolicyGradientConfig) -> None:
        super().__init__(config, total=0)
        self.spent: list[int] = []

    def dropped(self, cause: str, *, num_tokens: int, spent: int = 1) -> None:
        self.spent.append(spent)
        super().dropped(cause, num_tokens=num_tokens, spent=spent)


def make(prompts_per_step: int, max_staleness: int = 0, oversample: float = 0.0, **more: Any) -> Ledger:
    config = PolicyGradientConfig(
        batch=BatchConfig(prompts_per_step=prompts_per_step), rollout=RolloutConfig(group_size=1),
        filter=FilterConfig(max_batches=NO_LIMIT))
    return Ledger(Bound(prompts_per_step, max_staleness, oversample), Spent(config), **{"num_parts": 1, **more})


def start(ledger: Ledger, *uids: int, step: int = 0) -> list[Entry]:
    entries = [ledger.admit(step)[0] for _ in uids]
    assert uids_of(entries) == [*uids] and all(entry.state is State.WAITING for entry in entries)
    return entries


def uids_of(entries: list[Entry]) -> list[int]:
    return [entry.uid for entry in entries]


def in_flight(ledger: Ledger) -> list[int]:
    return uids_of(list(ledger.slots))


def entry_of(ledger: Ledger, uid: int) -> Entry:
    (entry,) = (entry for entry in ledger.slots if entry.uid == uid)
    return entry


def news_of(entry: Entry, num_tokens: int = 1) -> GroupReady:
    whole = np.full(1, num_tokens)
    scored = ScoredGroup(entry.uid, ONE, ONE, {}, whole, whole, ONE == 0, 0)
    return GroupReady(entry.uid, entry.attempt, scored, (), 0, 0.0, 0.0)


def generate(ledger: Ledger, uid: int, *, worker: int = 0, num_tokens: int = 1) -> Entry:
    entry = entry_of(ledger, uid)
    for _ in range(entry.num_parts):
        ledger.running(entry, worker, 0.0)
        ledger.generated(entry, num_tokens, 0.0)
    return entry


def ready(ledger: Ledger, *uids: int, worker: int = 0, num_tokens: int = 1) -> None:
    for uid in uids:
        entry = generate(ledger, uid, worker=worker, num_tokens=num_tokens)
        ledger.is_ready(entry, news_of(entry, num_tokens))


def drop(ledger: Ledger, uid: int, *, step: int = 0, worker: int = 0) -> None:
    ledger.drop(generate(ledger, uid, worker=worker), "same_reward", step)


def taken(ledger: Ledger, step: int, at_least: float = math.inf) -> list[int]:
    part = ledger.take(step, at_least=at_least)
    assert part is not None
    return uids_of(part.groups)


def test_a_synchronous_step_waits_for_all_and_takes_them_in_order():
    ledger = make(3)
    start(ledger, 0, 1, 2)
    assert not ledger.may_admit(0)
    ready(ledger, 2, 0)
    assert ledger.take(0) is None
    ready(ledger, 1)
    assert taken(ledger, 0) == [0, 1, 2]
    assert not ledger.may_admit(0), "a slot is held until the new weights are served"
    ledger.trained()
    assert ledger.may_admit(1)


def test_a_dropped_group_frees_its_slot():
    ledger = make(2)
    start(ledger, 0, 1)
    drop(ledger, 0)
    assert ledger.may_admit(0)
    assert in_flight(ledger) == [1]


def test_unfinished_are_the_prompts_that_a_resume_must_start_again():
    ledger = make(1, 2, next_uid=5)
    start(ledger, 5, 6, 7)
    ready(ledger, 6)
    assert taken(ledger, 0) == [6]
    assert ledger.unfinished == (5, 6, 7), "until the new weights are served"
    ledger.trained()
    assert ledger.unfinished == (5, 7)


def test_a_resumed_run_starts_with_what_was_unfinished_and_keeps_it_until_it_is_trained_on():
    ledger = make(2, 1, next_uid=40, unfinished=(31, 38))
    assert ledger.unfinished == (31, 38)
    start(ledger, 31)
    assert ledger.unfinished == (31, 38) and ledger.next_uid == 40
    start(ledger, 38, 40, 41)
    assert ledger.next_uid == 42
    ready(ledger, 31, 38)
    taken(ledger, 0)
    ledger.trained()
    assert ledger.unfinished == (40, 41)


@pytest.mark.parametrize(("max_staleness", "oversample"), [(0, 0.0), (2, 0.0), (0, 1.5)])
def test_no_prompt_starts_that_no_step_is_left_for(max_staleness, oversample):
    ledger = make(2, max_staleness, oversample, num_steps=3)
    started = trained = 0
    for step in range(3):
        new = []
        while ledger.may_admit(step):
            new.append(ledger.admit(step)[0].uid)
            started += 1
        ready(ledger, *new)
        trained += len(taken(ledger, step))
        ledger.trained()
    assert (trained, started) == (6, 6 if not oversample else 3 * (2 + 3)), "three spares a step, and no more"
    assert not ledger.may_admit(3)


def test_the_trainer_waits_for_the_group_that_would_pass_the_bound():
    ledger = make(1, 1)
    start(ledger, 0, 1)
    ready(ledger, 1)
    assert taken(ledger, 0) == [1]   # 0 can still be in the next one
    ledger.trained()
    start(ledger, 2, step=1)
    ready(ledger, 2)
    assert ledger.take(1) is None, "group 0, born at step 0, must be trained on at step 1"
    ready(ledger, 0)
    assert taken(ledger, 1) == [0]


def test_a_prompt_that_starts_in_a_step_can_be_trained_on_in_time():
    """While step 0 is trained on, the slots of its batch are not there: the newcomers are born at step 0."""
    ledger = make(2, 1)
    start(ledger, 0, 1, 2, 3)
    ready(ledger, 0, 1)
    assert taken(ledger, 0) == [0, 1]
    drop(ledger, 3)
    assert ledger.may_admit(0)
    start(ledger, 4)
    assert not ledger.may_admit(0)


def test_spares_take_the_place_of_dropped_groups_and_the_rest_start_again():
    ledger = make(3, 0, 0.6)
    start(ledger, 0, 1, 2, 3, 4)
    assert not ledger.may_admit(0)
    ready(ledger, 0, 4)
    drop(ledger, 1)
    assert ledger.may_admit(0), "3 has moved up, and another spare may start"
    ready(ledger, 3)
    assert ledger.take(0) is None, "2 comes before 4, whoever is faster"
    ready(ledger, 2)
    part = ledger.take(0)
    assert (uids_of(part.groups), uids_of(part.surplus)) == ([0, 2, 3], [4])
    metrics = ledger.drops.step_metrics()
    assert (metrics["filter/surplus"], metrics["filter/surplus_accepted"]) == (1, 1), "4 was finished"
    assert not ledger.may_admit(0), "no spare without anybody to stand in for"
    ledger.trained()
    assert in_flight(ledger) == [] and ledger.unfinished == (4,)
    (again,) = start(ledger, 4, step=1)
    assert (again.attempt, again.born, again.num_tokens) == (1, 1, 0)


def test_a_refused_spare_counts_only_when_its_turn_comes():
    ledger = make(2, 0, 1.0)
    start(ledger, 0, 1, 2, 3)
    drop(ledger, 2)
    assert in_flight(ledger) == [0, 1, 2, 3]
    assert ledger.may_admit(0), "it stands in for nobody: another spare may start"
    drop(ledger, 1)
    assert in_flight(ledger) == [0, 3], "its turn came, and went"
    ready(ledger, 0, 3)
    assert taken(ledger, 0) == [0, 3]


@pytest.mark.parametrize(("oversample", "spares"), [(0.0, 0), (0.4, 1), (1.0, 1), (2.5, 3)])
def test_spares_are_drawn_for_groups_that_may_yet_be_dropped(oversample, spares):
    ledger = make(3, 0, oversample)
    start(ledger, 0, 1, 2)
    ready(ledger, 0, 1)
    start(ledger, *range(3, 3 + spares))
    assert not ledger.may_admit(0)
    ready(ledger, 2)
    part = ledger.take(0)
    assert uids_of(part.surplus) == [*range(3, 3 + spares)]
    metrics = ledger.drops.step_metrics()
    assert (metrics["filter/surplus"], metrics["filter/surplus_accepted"]) == (spares, 0), "none of them was finished"


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_asynchronous_runs_draw_no_spare_that_could_only_be_thrown_away(max_staleness):
    ledger = make(2, max_staleness, 3.0)
    started = 0
    for step in range(10):
        new = []
        while ledger.may_admit(step):
            start(ledger, started, step=step)
            new.append(started)
            started += 1
        assert len(ledger.slots) == 2 * (1 + max_staleness), "all of them run"
        ready(ledger, *new)
        part = ledger.take(step)
        assert part is not None and part.surplus == []
        ledger.trained()
    assert started == 2 * (10 + max_staleness), "each of them is trained on in time"


def test_a_finished_spare_stands_in_for_one_and_fewer_are_drawn():
    ledger = make(4, 0, 2.0)
    start(ledger, *range(4 + 8))
    assert not ledger.may_admit(0)
    ready(ledger, 0, 1, 2, 4, 5)
    assert not ledger.may_admit(0), "two are there for the one that the batch waits for"
    drop(ledger, 3)
    assert taken(ledger, 0) == [0, 1, 2, 4]


def test_a_spare_is_told_as_such_and_counts_as_dropped_when_its_turn_comes():
    ledger = make(2, 0, 1.0)
    assert [ledger.admit(0)[1] for _ in range(4)] == [False, False, True, True]
    drop(ledger, 2)
    drop(ledger, 0)
    drop(ledger, 3)
    assert ledger.drops.spent == [0, 2, 1], "with 0 its own turn came, and that of 2, which had moved up"


def test_a_step_may_be_taken_in_parts_and_not_one_token_too_early():
    ledger = make(4)
    start(ledger, 0, 1, 2, 3)
    ready(ledger, 2, num_tokens=60)
    assert ledger.take(0, at_least=100) is None
    ready(ledger, 1, num_tokens=60)
    part = ledger.take(0, at_least=100)
    assert (uids_of(part.groups), part.complete) == ([1, 2], False)
    ready(ledger, 0, num_tokens=10)
    assert ledger.take(0, at_least=100) is None
    assert not ledger.may_admit(0), "slots are held until the new weights are served"
    ready(ledger, 3, num_tokens=10)
    part = ledger.take(0, at_least=100)
    assert (uids_of(part.groups), part.complete) == ([0, 3], True), "the rest, however small"


def test_no_part_is_taken_that_would_make_another_group_pass_the_bound():
    ledger = make(2, 1)
    start(ledger, 0, 1, 2, 3)
    ready(ledger, 2, 3)
    assert taken(ledger, 0, at_least=1) == [2, 3]
    ledger.trained()
    start(ledger, 4, 5, step=1)
    ready(ledger, 4, 5)
    assert ledger.take(1, at_least=1) is None, "0 and 1, born at step 0, must be trained on at step 1"
    ready(ledger, 1)
    assert taken(ledger, 1, at_least=1) == [1]
    ready(ledger, 0)
    assert ledger.take(1, at_least=1).complete


def test_a_group_is_generated_once_all_its_parts_have_come():
    ledger = make(1, num_parts=3)
    (entry,) = start(ledger, 0)
    ledger.running(entry, 1, 5.0)
    ledger.generated(entry, 10, 6.0)
    ledger.running(entry, 2, 7.0)   # another part: the worker is the first one's
    assert (entry.state, entry.worker, entry.start_s) == (State.RUNNING, 1, 5.0)
    ledger.generated(entry, 20, 8.0)
    assert entry.state is State.RUNNING
    ledger.generated(entry, 30, 9.0)
    assert (entry.state, entry.num_tokens, entry.end_s) == (State.GENERATED, 60, 9.0)


def test_the_groups_of_a_dead_worker_wait_again_at_their_places():
    """In whatever state they are: on an engine, generated, ready."""
    ledger = make(4, 1, num_parts=2)
    start(ledger, 0, 1, 2, 3)
    start(ledger, 4, step=0)
    ledger.running(entry_of(ledger, 0), 1, 3.0)
    ledger.generated(entry_of(ledger, 0), 7, 4.0)
    generate(ledger, 1, worker=1)
    ready(ledger, 2, worker=1)
    ready(ledger, 3, worker=0)
    lost = ledger.lost(1)
    assert uids_of(lost) == [0, 1, 2] and in_flight(ledger) == [0, 1, 2, 3, 4]
    for entry in lost:
        assert entry.state is State.WAITING and (entry.attempt, entry.born, entry.worker) == (1, 0, NOBODY)
        assert entry.num_generated == entry.num_tokens == 0 and entry.news is None
    assert entry_of(ledger, 3).is_ready and entry_of(ledger, 3).attempt == entry_of(ledger, 4).attempt == 0
    ready(ledger, 4)
    assert ledger.take(0) is None, "the batch waits for them"
    ready(ledger, 2, 1, 0, worker=0)
    assert taken(ledger, 0) == [0, 1, 2, 3]


def test_a_group_that_was_lost_keeps_its_birthday_and_passes_no_bound():
    ledger = make(1, 1)
    start(ledger, 0, 1)
    ready(ledger, 0, worker=1)
    ready(ledger, 1)
    ledger.lost(1)
    assert taken(ledger, 0) == [1]
    ledger.trained()
    start(ledger, 2, step=1)
    ready(ledger, 2)
    assert ledger.take(1) is None, "group 0 was born at step 0, whenever it started again"
    ready(ledger, 0)
    assert taken(ledger, 1) == [0]


def test_a_worker_that_dies_again_and_again_costs_no_slot_and_no_count():
    ledger = make(2)
    start(ledger, 0, 1)
    drop(ledger, 0)
    start(ledger, 2)
    for attempt in range(5):
        ready(ledger, 1, 2, num_tokens=10)
        assert entry_of(ledger, 1).attempt == attempt and not ledger.may_admit(0)
        ledger.lost(0)
    ready(ledger, 1, 2, num_tokens=10)
    assert taken(ledger, 0) == [1, 2]
    metrics = ledger.drops.step_metrics()
    assert metrics["filter/acceptance_rate"] == 2 / 3 and metrics["filter/length_trained"] == 10


def test_a_refused_spare_stays_refused_though_its_worker_dies():
    ledger = make(2, 0, 1.0)
    start(ledger, 0, 1, 2, 3)
    drop(ledger, 2, worker=1)
    ready(ledger, 3, worker=1)
    assert uids_of(ledger.lost(1)) == [3]
    refused = entry_of(ledger, 2)
    assert refused.state is State.REFUSED and refused.attempt == 0
    drop(ledger, 1)
    assert in_flight(ledger) == [0, 3], "its turn came, and went"
    assert ledger.drops.spent == [0, 2]


def test_what_ranks_hold_is_untouched_by_the_death_of_its_worker():
    ledger = make(2, 1)
    start(ledger, 0, 1, 2, 3)
    ready(ledger, 0, 1, 2, worker=1)
    assert taken(ledger, 0) == [0, 1]
    assert uids_of(ledger.lost(1)) == [2]
    for entry in list(ledger.slots)[:2]:
        assert entry.state is State.TRAINING and entry.attempt == 0 and entry.news is not None
    ledger.trained()
    assert ledger.unfinished == (2, 3)


def test_a_part_goes_back_from_a_lost_rank_and_is_taken_again():
    """What was accumulated before it stays where it is."""
    ledger = make(4)
    start(ledger, 0, 1, 2, 3)
    ready(ledger, 0, 1, num_tokens=60)
    assert taken(ledger, 0, at_least=100) == [0, 1]
    ready(ledger, 2, 3, num_tokens=10)
    part = ledger.take(0, at_least=100)
    ledger.back(part.groups)
    assert [entry.state for entry in ledger.slots] == [State.TRAINING] * 2 + [State.READY] * 2
    assert all(entry.attempt == 0 and entry.news is not None for entry in ledger.slots)
    again = ledger.take(0, at_least=100)
    assert (uids_of(again.groups), again.complete) == ([2, 3], True)
    ledger.trained()
    assert ledger.unfinished == ()


def test_of_a_part_that_went_back_what_can_not_be_had_starts_again():
    ledger = make(3)
    start(ledger, 0, 1, 2)
    ready(ledger, 0, 1, 2, worker=1)
    part = ledger.take(0)
    assert part.groups[1].at == GroupAt(1, 1, 0)
    ledger.back(part.groups)
    assert uids_of(ledger.again([part.groups[1]])) == [1]
    assert ledger.take(0) is None
    ready(ledger, 1, worker=2)
    part = ledger.take(0)
    assert [entry.at for entry in part.groups] == [GroupAt(1, 0, 0), GroupAt(2, 1, 1), GroupAt(1, 2, 0)]


def test_spares_that_a_whole_batch_made_superfluous_are_there_again_when_it_goes_back():
    ledger = make(2, 0, 1.0)
    start(ledger, 0, 1, 2, 3)
    ready(ledger, 0, 1, 2)
    part = ledger.take(0)
    assert (uids_of(part.groups), uids_of(part.surplus)) == ([0, 1], [2, 3])
    ledger.back(part.groups)
    ledger.again([part.groups[0]])
    start(ledger, 2)
    assert not ledger.may_admit(0), "one spare for the one that may be dropped"
    ready(ledger, 2)
    drop(ledger, 0)
    assert taken(ledger, 0) == [1, 2] and ledger.unfinished == (1, 2, 3)


def test_news_of_an_earlier_attempt_finds_nothing():
    ledger = make(1, 0, 1.0)
    (entry, spare) = start(ledger, 0, 1)
    assert ledger.find(0, 0) is entry and ledger.find(0, 1) is None and ledger.find(2, 0) is None
    ledger.running(entry, 1, 0.0)
    ledger.lost(1)
    assert ledger.find(0, 0) is None and ledger.find(0, 1) is entry
    ready(ledger, 0)
    assert ledger.take(0).surplus == [spare]
    assert ledger.find(1, 0) is None and ledger.find(1, 1) is None, "it has no slot"
    ledger.trained()
    assert ledger.find(0, 1) is None, "it has ended"
    (again,) = start(ledger, 1, step=1)
    assert ledger.find(1, 0) is None and ledger.find(1, 1) is again


def test_an_evaluation_holds_no_slot_and_counts_nowhere():
    ledger = make(2, 0, 1.0)
    groups = [ledger.evaluate(uid, 0, 2) for uid in (-1, -2, -3)]
    assert len(ledger.slots) == 0 and ledger.unfinished == () and ledger.next_uid == 0
    start(ledger, 0, 1, 2, 3)
    assert not ledger.may_admit(0), "two spares for the two"
    for entry in groups:
        assert ledger.find(entry.uid, 0) is entry
        ledger.running(entry, 1, 0.0)
        ledger.generated(entry, 5, 0.0)
    assert groups[0].state is State.RUNNING, "of two parts one has come"
    assert {*ledger.lost(1)} == {*groups} and all(
        entry.state is State.WAITING and (entry.attempt, entry.num_tokens) == (1, 0) for entry in groups)
    for entry in groups:
        for _ in range(2):
            ledger.running(entry, 0, 0.0)
            ledger.generated(entry, 5, 0.0)
        assert not ledger.may_admit(0)
    ledger.is_ready(groups[0], news_of(groups[0]))
    ledger.drop(groups[1], "reward_failed", 0)
    assert ledger.find(-1, 1) is None and ledger.find(-2, 1) is None, "they have ended"
    assert ledger.find(-3, 1) is groups[2] and ledger.take(0) is None
    assert ledger.lost(0) == [groups[2]]
    assert not ledger.may_admit(0)
    metrics = ledger.drops.step_metrics()
    assert metrics["filter/acceptance_rate"] == 1 and metrics["driver/groups_dropped"] == 0
    assert not any(name.startswith("filter/length") for name in metrics)
    ready(ledger, 0, 1)
    assert taken(ledger, 0) == [0, 1]


@pytest.mark.parametrize(("unlucky", "seeds"), [(0.0, 50), (0.2, 8)])
@pytest.mark.parametrize("oversample", [0, 0.5, 1.5])
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_the_bound_holds_and_nothing_stalls_whatever_the_order(max_staleness, oversample, unlucky, seeds):
    for seed in range(seeds):
        for at_least in (math.inf, seed % 4):
            run_randomly(make(4, max_staleness, oversample, num_parts=1 + seed % 2), random.Random(seed), num_steps=12,
                         at_least=at_least, unlucky=unlucky)


def test_parts_and_spares_give_the_synchronous_batch():
    for seed in range(30):
        batches = [run_randomly(make(4, 0, oversample), random.Random(1000 * seed + int(4 * oversample)), num_steps=12,
                                bad=seed, at_least=at_least)
                   for oversample, at_least in ((0, math.inf), (0.75, 1), (2, 2))]
        assert [sorted(b) for b in batches[0]] == [sorted(b) for b in batches[1]] == [sorted(b) for b in batches[2]]


def test_over_sampling_changes_no_synchronous_batch():
    for seed in range(30):
        batches = [run_randomly(make(4, 0, oversample), random.Random(1000 * seed + int(4 * oversample)), num_steps=12,
                                bad=seed) for oversample in (0, 0.75, 2)]
        assert batches[0] == batches[1] == batches[2]


@pytest.mark.parametrize("at_least", [math.inf, 2])
def test_workers_and_ranks_that_die_change_no_synchronous_batch(at_least):
    for seed in range(12):
        plain = run_randomly(make(4), random.Random(seed), num_steps=12, bad=seed)
        for oversample in (0, 0.75, 2):
            unlucky = run_randomly(make(4, 0, oversample), random.Random(1000 * seed + int(4 * oversample)),
                                   num_steps=12, bad=seed, at_least=at_least, unlucky=0.3)
            if at_least == math.inf:
                assert unlucky == plain
            assert [sorted(batch) for batch in unlucky] == [sorted(batch) for batch in plain]


def run_randomly(
    ledger: Ledger, chance: random.Random, num_steps: int, bad: int = 0, at_least: float = math.inf,
    unlucky: float = 0.0,
) -> list[list[int]]:
    """Groups of one token each finish in a random order, some are refused (by uid and step). Gives the batches.

    Now and then, as `unlucky` says, a worker dies, and a part goes back because not all of its arrays could be had.
    """
    bound, born, trained = ledger._bound, {}, set()
    step, batches = 0, [[]]
    while step < num_steps:
        while ledger.may_admit(step):
            entry, _ = ledger.admit(step)
            born[entry.uid] = step
        part = ledger.take(step, at_least=at_least)
        if part is None:
            assert unended(ledger), "nothing runs and nothing can be taken: a deadlock"
            go_on(ledger, chance, step, bad, unlucky)
            continue
        uids = uids_of(part.groups)
        assert part.complete or len(uids) >= at_least
        assert all(entry.born == born[entry.uid] for entry in part.groups)
        assert all(step - born[uid] <= bound.max_staleness for uid in uids)
        assert not trained & set(uids)
        assert bound.max_staleness == 0 < bound.oversample or not part.surplus, "nothing is thrown away for the bound"
        if chance.random() < unlucky:
            go_back(ledger, part.groups, chance)
            continue
        batches[-1] += uids
        trained |= set(uids)
        for _ in range(chance.randrange(3)):   # some end while the step trains
            go_on(ledger, chance, step, bad, unlucky)
        held = [entry.uid for entry in ledger.slots if entry.state is State.TRAINING]
        assert held == sorted(batches[-1]), "ranks hold them"
        if part.complete:
            assert len(batches[-1]) == bound.prompts_per_step
            ledger.trained()
            batches.append([])
            step += 1
    assert not trained & set(ledger.unfinished)
    return batches


def unended(ledger: Ledger) -> list[Entry]:
    return [entry for entry in ledger.slots if entry.state in (State.WAITING, State.RUNNING, State.GENERATED)]


def go_on(ledger: Ledger, chance: random.Random, step: int, bad: int, unlucky: float) -> None:
    """One of those that run goes on until it ends, or half the way; or a worker dies."""
    if chance.random() < unlucky:
        lose(ledger, chance.randrange(NUM_WORKERS))
        return
    entries = unended(ledger)
    if not entries:
        return
    entry = chance.choice(entries)
    ledger.running(entry, chance.randrange(NUM_WORKERS), 0.0)
    while entry.num_generated < entry.num_parts:
        ledger.generated(entry, 1, 0.0)
        if chance.random() < unlucky:
            return
    refused = random.Random(f"{bad} {entry.uid} {step if ledger._bound.max_staleness == 0 else 0}").random() < 0.3
    if refused:
        ledger.drop(entry, "same_reward", step)
    else:
        ledger.is_ready(entry, news_of(entry))


def lose(ledger: Ledger, worker: int) -> None:
    before = [(entry.uid, entry.born) for entry in ledger.slots]
    attempts = {entry.uid: entry.attempt for entry in ledger.slots}
    lost = ledger.lost(worker)
    assert [(entry.uid, entry.born) for entry in ledger.slots] == before, "each at its place"
    for entry in lost:
        assert entry.state is State.WAITING and entry.attempt == attempts[entry.uid] + 1
        assert ledger.find(entry.uid, attempts[entry.uid]) is None
    assert all(entry.state in (State.TRAINING, State.REFUSED) for entry in ledger.slots if entry.worker == worker)


def go_back(ledger: Ledger, part: list[Entry], chance: random.Random) -> None:
    """As when a rank dies, or can't get the arrays of some."""
    ledger.back(part)
    ledger.again(chance.sample(part, chance.randrange(len(part) + 1)))
