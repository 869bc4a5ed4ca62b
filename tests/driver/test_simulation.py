"""The scheduler over thousands of random schedules, in simulated time: no deadlock, nobody starves, the bound holds."""

from __future__ import annotations

import asyncio
import dataclasses
import math

import pytest

from tests.driver.schedules import RandomSchedule, check
from tests.fakes.simulated import Costs, Deadlock, SimulatedTime, World, simulate

pytestmark = pytest.mark.unit

#: Many more: python -m benchmarks.simulate --schedules 100000
NUM_SCHEDULES = (80, pytest.param(1000, marks=pytest.mark.all))


@pytest.fixture(scope="module")
def clock():
    clock = SimulatedTime()
    yield clock
    clock.close()


@pytest.mark.parametrize("number", NUM_SCHEDULES)
def test_random_schedules(clock, number):
    for seed in range(number):
        check(RandomSchedule(seed), clock=clock)


def test_an_order_that_comes_when_another_engine_stands_there(clock):
    """That one waits for weights, for which a deterministic run waits until all groups have come."""
    check(RandomSchedule(60148), clock=clock)


def test_groups_that_end_while_a_step_is_written_down(clock):
    """Dropped then, a group must not be counted by a version that the slots don't have yet."""
    for seed in (383, 698, 1318):
        schedule = RandomSchedule(seed)
        schedule.costs = dataclasses.replace(schedule.costs, text_s=5.0)
        check(schedule, clock=clock)


def test_over_sampling_and_splitting_change_no_synchronous_batch(clock):
    for seed in range(40):
        schedule = RandomSchedule(seed)
        batches = []
        for oversample, split in ((0.0, 1), (1.0, 2)):
            config = schedule.config
            config = dataclasses.replace(
                config, driver=dataclasses.replace(config.driver, max_staleness=0),
                filter=dataclasses.replace(config.filter, oversample=oversample),
                rollout=dataclasses.replace(config.rollout, split_groups=split))
            world = schedule.world()
            simulate(config, world, clock=clock, start=schedule.start)
            batches.append([sorted(batch) for batch in world.batches])
        assert batches[0] == batches[1]


@pytest.mark.parametrize("refused", [2, 10])
def test_spares_fill_the_batch_without_another_round(clock, refused):
    """Of `refused` prompts all but one are dropped, after 1 s: a batch takes a round of 1 s for each time that prompts
    are drawn in their place, or one round with enough spares."""
    costs, seconds = Costs(token_s=0.01, sequence_s=0.0), []
    for oversample in (0.0, 2.0 * refused):
        config = RandomSchedule.plain(prompts_per_step=8, group_size=2, num_steps=6, oversample=oversample,
                                      max_num_seqs=1000)
        world = World(costs, length_of=lambda uid, i: 100, prompt_tokens=1, num_rows=10**9,
                      fate_of=lambda uid: "same" if uid % refused else "kept")
        simulate(config, world, clock=clock)
        seconds.append(world.step_end_s[-1] / 6)
        assert world.batches[0] == [refused * i for i in range(8)]
    assert seconds[0] > 1.9 and seconds[1] == pytest.approx(1.0)


def test_a_deadlock_is_seen(clock):
    async def waits() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock):
        clock.run(waits())


def test_time_is_what_the_costs_say(clock):
    """One engine, one group of two samples of 100 and 50 tokens: 50 steps of two sequences, 50 of one."""
    config = RandomSchedule.plain(prompts_per_step=1, group_size=2, num_steps=2)
    costs = Costs(token_s=0.01, sequence_s=0.001, prefill_s=0.1, score_s=3.0, train_s=5.0, train_token_s=0.01,
                  publish_s=7.0, driver_s=0.5)
    world = World(costs, length_of=lambda uid, i: (100, 50)[i], prompt_tokens=10)
    simulate(config, world, clock=clock)
    step_s = 0.5 + 2 * 10 * 0.1 + 50 * 0.012 + 50 * 0.011 + 3.0 + 5.0 + 170 * 0.01 + 7.0
    assert world.step_end_s == pytest.approx([7.0 + step_s, 7.0 + 2 * step_s])
    assert world.metrics[0]["train/step_s"] == pytest.approx(5.0 + 1.7)


def test_generation_and_training_overlap(clock):
    """With max_staleness=1 a step takes the longer of the two, and with 0 their sum."""
    costs, seconds = Costs(token_s=0.01, sequence_s=0.0, train_s=1.0), []
    for max_staleness in (0, 1):
        config = RandomSchedule.plain(prompts_per_step=2, group_size=1, num_steps=40, max_staleness=max_staleness,
                                      max_num_seqs=2)
        world = World(costs, length_of=lambda uid, i: 100)
        simulate(config, world, clock=clock)
        seconds.append((world.step_end_s[-1] - world.step_end_s[9]) / 30)
    assert seconds == pytest.approx([2.0, 1.0], rel=0.02)


def test_a_synchronous_step_trains_on_groups_while_others_generate(clock):
    """One sequence after another, 1 s each, and 0.5 s of training for each: all but the last is hidden."""
    costs = Costs(token_s=0.01, sequence_s=0.0, train_token_s=0.005)
    config = RandomSchedule.plain(prompts_per_step=4, group_size=1, num_steps=3, max_num_seqs=1)
    seconds = []
    for part_tokens in (math.inf, 100):
        world = World(costs, length_of=lambda uid, i: 99, prompt_tokens=1)
        simulate(config, world, clock=clock, part_tokens=part_tokens)
        seconds.append(world.step_end_s[-1] / 3)
    assert seconds == pytest.approx([4 + 4 * 0.5, 4 + 0.5], rel=0.02)
    assert [metrics["driver/num_parts"] for metrics in world.metrics] == [4, 4, 4]
    assert world.metrics[0]["train/step_s"] == pytest.approx(4 * 0.5), "what was accumulated is training too"


def test_the_longest_expected_goes_first_once_it_is_known(clock):
    """Rows of very different lengths, more than an engine runs at once: what is learned of them shortens the tail."""
    config = RandomSchedule.plain(prompts_per_step=32, group_size=1, num_steps=12, max_num_seqs=4)
    world = World(Costs(token_s=0.01, sequence_s=0.0), num_rows=32,
                  length_of=lambda uid, i: 400 if uid % 32 in (13, 27, 31) else 20)
    simulate(config, world, clock=clock)
    first_s, last_s = world.metrics[0]["driver/step_s"], world.metrics[-1]["driver/step_s"]
    assert last_s < 0.8 * first_s, (first_s, last_s)
    assert world.metrics[-1]["driver/step_s"] >= 4.0, "no step is shorter than its longest response"
