"""The bound on staleness: whether a prompt may start, and which groups a step takes. Pure functions.

Takes:  the groups that hold a slot, in the order in which they got it; the steps done; the bound.
Knows:  a prompt starts only if its group can still be trained on in time after all groups before it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flux_ray.driver.entry import Entry, State


@dataclass(frozen=True)
class Bound:
    """What a run promises of staleness.

    A step trains on `prompts_per_step` groups, so the i-th group in the queue is trained on after
    i // prompts_per_step further steps. The groups that are in time there are the core. Over-sampled groups stand
    behind the core and are spares: a spare moves up when a group of the core is dropped, and is surplus once the batch
    is full. `oversample` spares run for each group that may yet be dropped and that no finished spare stands in for.
    So a batch is the first accepted groups in the order of the prompts, whatever `oversample` is. With
    max_staleness > 0 there are no spares: groups of the next batches run anyway and stand in, and a spare beyond them
    could only pass the bound or be thrown away.
    """

    prompts_per_step: int
    max_staleness: int
    oversample: float = 0.0
    in_order: bool = False  # a batch is the first groups in the order of the prompts, whichever was faster

    def in_time(self, born: int, place: int, step: int) -> bool:
        """Whether a group is within the bound at its turn. `place`: groups before it, those in training included."""
        return born + self.max_staleness >= step + place // self.prompts_per_step

    def may_start(self, num_slots: int, step: int, steps_left: float) -> bool:
        """Whether one more group may start in the core, behind `num_slots` others."""
        return num_slots < steps_left * self.prompts_per_step and self.in_time(step, num_slots, step)

    def may_spare(self, untrained: Iterable[Entry], num_slots: int, counts: Counter[State]) -> bool:
        """Whether one more spare may start for what runs in the core. `untrained`: oldest first, those not in training.

        It counts without a look at each spare: there may be many, and this is asked once for each of them.
        """
        if self.max_staleness or not self.oversample:
            return False
        core = list(itertools.islice(untrained, self.prompts_per_step - counts[State.TRAINING]))
        running = sum(not entry.is_ready for entry in core)
        finished = counts[State.READY] - (len(core) - running)  # spares, each of which is sure to stand in for one
        ended = counts[State.TRAINING] + counts[State.READY] + counts[State.REFUSED]
        spares = num_slots - ended - running  # those that run
        return spares < math.ceil(self.oversample * max(0, running - finished))


def core_and_spares(
    slots: Iterable[Entry], bound: Bound, *, step: int, num_training: int,
) -> tuple[list[Entry], list[Entry]]:
    """The slots' core and spares, oldest first, where `step` is in training or is trained next."""
    core: list[Entry] = []
    spares: list[Entry] = []
    for slot in slots:
        (core if bound.in_time(slot.born, num_training + len(core), step) else spares).append(slot)
    return core, spares


def chosen(
    core: Sequence[Entry], bound: Bound, *, step: int, num_training: int,
) -> tuple[list[Entry], list[Entry]]:
    """The groups to take, as many as a step still needs; and those that the step must wait for, if it must.

    Taken are the first of the core that are ready, as long as the groups that they pass can still be in time. While
    the step must wait, only the end of one of the awaited groups changes anything.
    """
    needed = bound.prompts_per_step - num_training
    taken: list[Entry] = []
    passed: list[Entry] = []
    most = math.inf  # so many may go before those that were passed over
    for slot in core:
        if len(taken) == needed:
            break
        if slot.is_ready and len(taken) < most:
            taken.append(slot)
            continue
        if bound.in_order:
            break
        place = num_training + len(passed)
        passed.append(slot)
        steps = slot.born + bound.max_staleness - step + 1  # until its time has passed
        most = min(most, steps * bound.prompts_per_step - 1 - place)
    awaited = [slot for slot in passed if not slot.is_ready] if len(taken) < needed and len(taken) >= most else []
    return taken, awaited
