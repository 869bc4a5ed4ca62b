"""A group's entry in the ledger, and the states of its life.

Takes:  nothing.
Gives:  `State`, `Entry`; `Taken`, what a step takes.
Never:  changes its own state: the ledger does.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from flux_ray.messages import GroupAt, GroupReady

NOBODY = -1

Key = tuple[int, int]  # uid and attempt


class State(enum.Enum):
    """WAITING ► RUNNING ► GENERATED ► READY ► TRAINING ► TRAINED, or GENERATED ► DROPPED, a spare by way of REFUSED."""

    WAITING = "waiting"  # for an engine
    RUNNING = "running"  # a part of it, at least, is on an engine
    GENERATED = "generated"  # it is scored, filtered, referenced
    READY = "ready"  # to be trained on
    TRAINING = "training"
    TRAINED = "trained"
    REFUSED = "refused"  # by a filter: a spare whose turn may never come
    DROPPED = "dropped"


@dataclass(eq=False)
class Entry:
    """One group."""

    uid: int
    attempt: int  # counts its starts: news of an earlier start is ignored
    born: int  # steps done when it got its slot
    num_parts: int
    num_generated: int = 0  # parts that have come
    state: State = State.WAITING
    worker: int = NOBODY
    engine: int = NOBODY  # that the last part was given to
    num_tokens: int = 0  # sampled
    start_s: float = 0.0  # on the driver's clock: the first part went to an engine
    end_s: float = 0.0  # the last part came
    news: GroupReady | None = None  # once it is READY
    total_tokens: int = 0  # of prompt and responses, once it is READY
    cause: str = ""  # why it was refused

    @property
    def key(self) -> Key:
        return self.uid, self.attempt

    @property
    def is_ready(self) -> bool:
        return self.state is State.READY

    @property
    def ready(self) -> GroupReady:
        assert self.news is not None, (self.uid, self.state)
        return self.news

    @property
    def at(self) -> GroupAt:
        return GroupAt(self.worker, self.uid, self.attempt)


@dataclass(frozen=True)
class Taken:
    """What a step takes: all of it, or some while others still run."""

    groups: list[Entry]  # in the order in which they got their slots
    complete: bool  # the step has all its groups
    surplus: list[Entry]  # over-sampled groups that can't be trained on in time any more: they start again
