"""Random schedules for the scheduler, and what must hold of each.

Takes:  a seed.
Gives:  `RandomSchedule`: config, world and start of a run; `check`: runs it, and asserts.
"""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

from flux_ray.accounts import audited
from flux_ray.cluster.group import ActorDied
from flux_ray.config import (
    BatchConfig,
    DriverConfig,
    FilterConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
    RolloutObservabilityConfig,
    TrainConfig,
)
from flux_ray.config.sections import CheckpointConfig
from flux_ray.driver.loop import Loop
from flux_ray.records import LoopState
from tests.fakes.simulated import Costs, SimulatedTime, World, simulate

TOO_MANY_DEATHS = "have died since the last step"  # of reward workers, by groups that are deadly to them
NO_LIMIT = 10_000  # batches that a step may draw: a schedule may refuse many in a row


class RandomSchedule:
    """Batches, bounds, engines, speeds, lengths, what is refused and what fails: by chance, the same for a seed."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        self.seed = seed
        self.refused = chance.choice([0.0, 0.0, 0.3, 0.7])
        self.failing = chance.choice([0.0, 0.0, 0.2])
        most = 5 if seed % 10 == 0 else 3  # prompts a step, and steps: mostly small ones, for many
        first = chance.choice([0, 0, 3])
        waiting = sorted(chance.sample(range(40), chance.randrange(8))) if first else []
        self.start = LoopState(step=first, next_uid=40 if first else 0, unfinished=tuple(waiting))
        self.config = self.plain(
            prompts_per_step=chance.randint(1, most), group_size=chance.randint(2, 3),
            num_steps=first + chance.randint(1, most), max_staleness=chance.choice([0, 0, 1, 2, 4]),
            oversample=chance.choice([0.0, 0.0, 0.4, 1.0, 2.5]), num_engines=chance.randint(1, 3),
            max_num_seqs=chance.choice([1, 2, 5, 100]), split_groups=chance.choice([1, 1, 2, 3]),
            num_workers=chance.randint(1, 2), samples_per_step=chance.choice([0, 2]))
        some = lambda: chance.choice([0.0, 0.0, chance.random(), 10 * chance.random()])  # noqa: E731
        self.costs = Costs(token_s=chance.choice([1e-3, 1.0]), sequence_s=chance.choice([0.0, 0.3]), prefill_s=some(),
                           score_s=some(), text_s=some(), train_token_s=some() / 10, train_s=some(), publish_s=some(),
                           driver_s=some() / 10)
        self.spread = chance.choice([0.0, 0.8, 2.5])  # sigma of the log-normal lengths
        self.part_tokens = chance.choice([math.inf, 1, 50, 200])
        rollout = dataclasses.replace(self.config.rollout, kv_after_update=chance.choice(["recompute", "keep"]))
        train = dataclasses.replace(self.config.train, num_ranks=chance.choice([1, 1, 2, 3]))
        self.config = dataclasses.replace(self.config, rollout=rollout, train=train)
        num_workers = chance.randint(1, 3)
        self.config = dataclasses.replace(
            self.config, rollout=dataclasses.replace(self.config.rollout, num_workers=num_workers))
        self.deadly = chance.choice([0.0, 0.0, 0.0, 0.1])
        self.lost_arrays = chance.choice([0.0, 0.0, 0.1, 0.3])
        self.costs = dataclasses.replace(self.costs, worker_s=some() / 10, replace_s=some())
        self.config = dataclasses.replace(self.config, driver=dataclasses.replace(
            self.config.driver, deterministic=chance.random() < 0.2))
        spacing_s = 10 * self.costs.token_s * most  # about as long as a few groups take
        counts = {"rollout": num_workers, "engine": self.config.rollout.num_engines}
        self.kills = [(chance.random() * spacing_s * 4**i, role, chance.randrange(counts[role]))
                      for role in counts for i in range(chance.choice([0, 0, 1, 3, 6]))]

    @staticmethod
    def plain(**values: Any) -> PolicyGradientConfig:
        """A config without the cost of parsing one."""
        given = dict(group_size=1, num_steps=1, max_staleness=0, oversample=0.0, num_engines=1, max_num_seqs=100,
                     split_groups=1, num_workers=1, num_ranks=1, samples_per_step=0) | values
        return PolicyGradientConfig(
            batch=BatchConfig(prompts_per_step=given["prompts_per_step"]),
            rollout=RolloutConfig(num_engines=given["num_engines"], group_size=given["group_size"],
                                  max_num_seqs=given["max_num_seqs"], split_groups=given["split_groups"]),
            reward=RewardConfig(num_workers=given["num_workers"], on_failure="drop"),
            filter=FilterConfig(reward="task" if given["group_size"] > 1 else None, max_batches=NO_LIMIT,
                                oversample=given["oversample"]),
            checkpoint=CheckpointConfig(every_s=0.0),  # which would be of the real time that a simulation takes
            train=TrainConfig(num_ranks=given["num_ranks"]),
            driver=DriverConfig(num_steps=given["num_steps"], max_staleness=given["max_staleness"]),
            observability=RolloutObservabilityConfig(samples_per_step=given["samples_per_step"]))

    def world(self) -> World:
        return World(self.costs, length_of=self._length, fate_of=self._fate, prompt_tokens=3, num_rows=7,
                     kills=self.kills, lost_arrays=self.lost_arrays, seed=self.seed)

    def _length(self, uid: int, sample: int) -> int:
        chance = random.Random(hash((self.seed, uid, sample)))
        return max(1, min(1000, round(10 * math.exp(self.spread * chance.gauss(0, 1)))))

    def _fate(self, uid: int) -> str:
        if random.Random(hash((self.seed, uid, 0, 0))).random() < self.deadly:
            return "deadly"
        drawn = random.Random(hash((self.seed, uid))).random()
        if drawn < self.failing:
            return "failed"
        return "same" if drawn < self.failing + (1 - self.failing) * self.refused else "kept"


def check(schedule: RandomSchedule, *, clock: SimulatedTime) -> World:
    """No deadlock, nobody starves, the bound holds, max_staleness=0 is on-policy. AssertionError names the seed."""
    world = schedule.world()
    try:
        loop = simulate(schedule.config, world, clock=clock, start=schedule.start,
                        part_tokens=schedule.part_tokens)
        _check(schedule, world, loop)
    except ActorDied as error:
        if not (schedule.deadly and TOO_MANY_DEATHS in str(error)):  # else it ends as it must
            raise
    except BaseException as error:
        error.add_note(f"schedule {schedule.seed}: {schedule.config} {schedule.costs}")
        raise
    return world


def _check(schedule: RandomSchedule, world: World, loop: Loop) -> None:
    config, bound = schedule.config, schedule.config.driver.max_staleness
    trained = [uid for batch in world.batches for uid in batch]
    assert len(world.batches) == config.driver.num_steps - schedule.start.step, "every step was done"
    assert all(len(batch) == config.batch.prompts_per_step for batch in world.batches)
    assert len(set(trained)) == len(trained), "no group is trained on twice"
    assert all(0 <= newest <= oldest <= bound for oldest, newest in world.staleness), "the bound"

    # Every prompt that was drawn: trained on, dropped for a cause, or still in time to be.
    waiting = set(loop.ledger.unfinished)
    drawn = {*range(schedule.start.next_uid, loop.ledger.next_uid), *schedule.start.unfinished}
    dropped = {uid for uid in drawn & world.scored if schedule._fate(uid) != "kept"}
    assert not waiting & set(trained)
    assert drawn == waiting | set(trained) | (dropped - waiting), "no prompt is lost"
    audit = audited(world.ledger_lines)
    assert audit.is_clean, audit
    assert (audit.drawn, audit.trained) == (len(drawn), len(trained)), audit
    assert all(entry.born + bound >= config.driver.num_steps for entry in loop.ledger.slots), "nobody starves"
    if bound or not config.filter.oversample:
        assert sum(metrics["filter/surplus"] for metrics in world.metrics) == 0, "nothing is thrown away for the bound"
