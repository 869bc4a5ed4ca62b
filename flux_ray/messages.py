"""What driver, rollout workers and ranks say to one another of groups.

Takes:  nothing.
Gives:  Orders (the driver's), news (a worker's), where a group is, its arrays; Attested (an engine's).
Knows:  a group is known by its uid and attempt; all but OwnedGroup and TrainedTokens is small, whatever the length of
        the responses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from flux_ray.cluster.group import CallFailed
from flux_ray.records import Prompt, RolloutGroup, ScoredGroup

PROBE_TOKENS = 8  # sampled behind each prompt of a probe: few steps, for the trainer waits for them


class Attested(NamedTuple):
    """What an engine says of itself after an update."""

    version: str  # as vLLM labels what it serves
    wrong: tuple[str, ...] = ()  # parameters that aren't as they were sent, and why; some of many


class GroupAt(NamedTuple):
    """Where a group's arrays are: at a rollout worker, by its uid and attempt."""

    worker: int
    uid: int
    attempt: int


class OwnedGroup(NamedTuple):
    """What a rank trains on, as a group's rollout worker gives it."""

    group: RolloutGroup
    reference_logprobs: list[np.ndarray] | None  # (T,) float32 of each trajectory; None where no KL is asked for
    scored: ScoredGroup | None  # None: of a probe


class TrainedTokens(NamedTuple):
    """What a rank's step made of groups, for their rollout worker: all their samples' tokens one after the other.

    Few large arrays: on the way to another process each small one costs several times its numbers.
    """

    groups: list[GroupAt]
    num_tokens: list[int]  # of each group, all samples together
    updates: list[int | None]  # which of the step's updates in a pass took it; None: no update was made
    values: dict[str, np.ndarray | None]  # advantages, policy_logprobs ... ► (S,) float32; None: not known


class Written(NamedTuple):
    """What a rollout worker has written of a step's rollouts, or why it couldn't."""

    num_bytes: int
    why_not: str = ""


@dataclass(frozen=True)
class Assignment:
    """A group to carry, or a part of one: one request on one engine.

    >>> Assignment(prompt, attempt=0, engine=3, group_size=8).prompt.num_samples   # a part of four
    4
    """

    prompt: Prompt  # of the part: its samples and their seed
    attempt: int
    engine: int
    group_size: int  # samples of all parts together
    temperature: float | None = None  # of an evaluation; None: the rollout's
    evaluates: bool = False  # scored, and neither filtered nor kept
    incarnation: str = ""  # of the engine that is meant; empty: who stands there

    @property
    def key(self) -> tuple[int, int]:
        return self.prompt.uid, self.attempt


@dataclass(frozen=True)
class Orders:
    """What the driver tells a rollout worker, all at once. Keys are (uid, attempt)."""

    assignments: list[Assignment] = field(default_factory=list)
    forgotten: list[tuple[int, int]] = field(default_factory=list)  # nobody needs them any more, running or not
    scored_again: list[tuple[int, int]] = field(default_factory=list)  # a reward worker died of them, or of others

    def __bool__(self) -> bool:
        return bool(self.assignments or self.forgotten or self.scored_again)


@dataclass(frozen=True)
class PartGenerated:
    """A part has left its engine, which has capacity for another. `seed` tells the part."""

    uid: int
    attempt: int
    seed: int
    num_tokens: int  # sampled


@dataclass(frozen=True)
class PartLost:
    """The engine that sampled a part is gone, or doesn't compute any more."""

    uid: int
    attempt: int
    seed: int
    engine: int
    incarnation: str
    why: str


@dataclass(frozen=True)
class GroupReady:
    """Scored, let through by the filter, referenced, and kept at the worker. An evaluation's is scored alone."""

    uid: int
    attempt: int
    scored: ScoredGroup
    texts: tuple[str, ...]  # of all responses, in an evaluation; none in training, where they are asked for later
    num_spanning: int  # samples whose tokens are of more than one version
    score_s: float  # seconds that it took to be scored, waiting for a reward worker included
    reference_s: float


@dataclass(frozen=True)
class GroupDropped:
    """A filter refused it, or its reward failed and the run goes on (`why` tells it)."""

    uid: int
    attempt: int
    cause: str
    why: str = ""


@dataclass(frozen=True)
class RewardWorkerLost:
    """Its reward worker died, or answers nobody, while it was scored: it waits to be scored again.

    `guilty`: it was alone there.
    """

    uid: int
    attempt: int
    reward_worker: int
    incarnation: str
    silent: bool  # still there: to be ended
    guilty: bool
    why: str


@dataclass(frozen=True)
class GroupFailed:
    """It ends the run. `what` the worker was doing."""

    uid: int
    attempt: int
    what: str
    failure: CallFailed


News = PartGenerated | PartLost | GroupReady | GroupDropped | RewardWorkerLost | GroupFailed
