"""One frozen, complete record per hop of the data.

Takes:  nothing; numpy arrays and plain values are put in by whoever makes the record.
Gives:  Prompt ► SamplingRequest ► Sampled ► Trajectory ► RolloutGroup ► Responses ► Scores ► ScoredGroup ► Sample ►
        MicroBatch ► StepReport; PreferencePair beside them.
Knows:  the axes legend below, and each record's own invariants (asserted once, at birth).
Never:  holds a field that a later stage fills in: what a later stage adds is another record.

Axes, as suffixes of names: G samples of one prompt, N samples of a batch, T tokens of one sample (prompt and response),
B rows of a padded view, L its length, S the flat token axis of a micro-batch; M a sample's first tokens, K its experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

FINISH_STOP = "stop"  # the policy sampled its end token (or a stop string): the response is whole
FINISH_LENGTH = "length"  # the token limit cut it: truncated, without an end token

OVERLONG = "overlong"  # name of the part of a reward that is the soft penalty on length
FAILED = "/failed"  # name of a part, which no function can have: 1 for a sample whose reward failed

#: A message of a chat: {"role": ..., "content": ...}
Message = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt on its way to an engine.

    >>> Prompt(uid=17, row=3, text="12+30=", token_ids=np.array([5, 6, 14, 7, 4, 15], np.int32),
    ...        columns={"answer": "42"}, num_samples=8, seed=123).num_samples
    8
    """

    uid: int  # position in the run's stream of prompts: 0, 1, 2 … never used twice in a run
    row: int  # row of the data file it came from, from 0
    text: str | list[Message]  # as the user wrote it: plain text, or chat messages
    token_ids: np.ndarray  # (T,) int32, after the chat template
    columns: dict[str, object]  # the row's other columns; rewards get them by name
    num_samples: int  # G
    seed: int  # sample i is drawn with seed + i, whatever engine draws it
    data_set: str = ""  # the name of the set that it came from, where there are several
    rewards: tuple[str, ...] = ()  # the functions that score it; none: all of the run's
    max_tokens: int | None = None  # of a response; none: rollout.max_tokens

    @property
    def where(self) -> str:
        """Its row, for a message."""
        return f"prompt row {self.row + 1} (from 1){f' of {self.data_set}' if self.data_set else ''}"


@dataclass(frozen=True)
class Completion:
    """What `generate` gives for one of its n samples: the sampled tokens and nothing else.

    >>> Completion(np.array([4, 2], np.int32), np.array([-.1, -.2], np.float32), np.array([7, 7], np.int32),
    ...            "stop").num_tokens
    2
    """

    token_ids: np.ndarray  # (T,) int32, the sampled end token included
    logprobs: np.ndarray  # (T,) float32, of the distribution that was sampled (after temperature)
    versions: np.ndarray  # (T,) int32, the policy version that sampled each token
    finish_reason: str  # FINISH_STOP or FINISH_LENGTH
    experts: np.ndarray | None = None  # (M, layers, K) uint8 or uint16: which ones the engine chose for the request's
    # tokens and these, the last one aside, which it never ran; layers without experts have zeros

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class SamplingRequest:
    """What an engine is asked: n samples after some tokens.

    >>> SamplingRequest(np.array([5, 6], np.int32), n=4, seed=123, temperature=1.0, max_tokens=16).n
    4
    """

    token_ids: np.ndarray  # (T,) int32
    n: int
    seed: int  # sample i is drawn with seed + i, whatever else runs beside it
    temperature: float
    max_tokens: int
    probes: bool = False  # goes before all that wait, draws from the whole distribution, past the end token
    owner: str = ""  # incarnation of who asks: when that is gone, so is the request


@dataclass(frozen=True)
class ComparedTokens:
    """What an engine and the trainer gave to the same tokens under the same weights, at the run's temperature.

    Axis N: sampled tokens, by position in their sequence (from 0).

    >>> ComparedTokens(0, np.array([8]), np.array([17]), np.float32([-1.5]), np.float32([-1.25])).gaps_N
    array([0.25], dtype=float32)
    """

    engine: int
    positions_N: np.ndarray  # int64
    token_ids_N: np.ndarray  # int32
    engine_logprobs_N: np.ndarray  # float32
    trainer_logprobs_N: np.ndarray  # float32

    @property
    def gaps_N(self) -> np.ndarray:
        return np.abs(self.trainer_logprobs_N - self.engine_logprobs_N)

    @classmethod
    def joined(cls, several: Sequence[ComparedTokens]) -> ComparedTokens:
        """Those of one engine as one, in the order of their positions."""
        order = np.argsort(np.concatenate([one.positions_N for one in several]), kind="stable")
        names = ("positions_N", "token_ids_N", "engine_logprobs_N", "trainer_logprobs_N")
        return cls(several[0].engine,
                   *(np.concatenate([getattr(one, name) for one in several])[order] for name in names))


@dataclass(frozen=True)
class Sampled:
    """What an engine answers.

    >>> Sampled(completions=(), step=7).step
    7
    """

    completions: tuple[Completion, ...]  # n of them
    step: int  # updates that the newest policy among their tokens had

    def __reduce__(self) -> tuple[object, ...]:
        """See `_joined`."""
        rows = [(c.token_ids, c.logprobs, c.versions) for c in self.completions]
        others = [(c.finish_reason, c.experts) for c in self.completions]
        return _sampled, (*_joined(rows), others, self.step)


def _sampled(
    lengths: list[int], arrays: list[np.ndarray], others: list[tuple[str, np.ndarray | None]], step: int,
) -> Sampled:
    rows = zip(*(_split(array, lengths) for array in arrays), *zip(*others, strict=True), strict=True)
    return Sampled(tuple(itertools.starmap(Completion, rows)), step)


def _joined(rows: Sequence[tuple[np.ndarray, ...]]) -> tuple[list[int], list[np.ndarray]]:
    """Lengths of rows, and each column's arrays in one: on the way to another process each small array costs several
    times its numbers. A row has arrays of one length; `_split` undoes it."""
    return [len(row[0]) for row in rows], [np.concatenate(column) for column in zip(*rows, strict=True)]


def _split(array: np.ndarray, lengths: list[int]) -> list[np.ndarray]:
    ends = list(itertools.accumulate(lengths))
    return [array[end - length : end] for end, length in zip(ends, lengths, strict=True)]


@dataclass(frozen=True)
class Trajectory:
    """One whole sequence: prompt, sampled tokens and, in multi-turn rollouts, tokens of tools between them.

    >>> t = Trajectory(np.array([5, 6, 4, 2], np.int32), np.array([0, 0, 1, 1], bool),
    ...                np.array([0, 0, -.1, -.2], np.float32),
    ...                np.array([-1, -1, 7, 7], np.int32), prompt_length=2, finish_reason="stop")
    >>> t.num_loss_tokens, t.oldest_version
    (2, 7)
    """

    token_ids: np.ndarray  # (T,) int32
    loss_mask: np.ndarray  # (T,) bool: True where the policy sampled the token
    sampler_logprobs: np.ndarray  # (T,) float32: 0 where the mask is False
    versions: np.ndarray  # (T,) int32: -1 where the mask is False
    prompt_length: int  # tokens of the prompt; what follows is the response
    finish_reason: str
    experts: np.ndarray | None = None  # (M, layers, K), as a Completion has them: of the sequence's first M tokens

    def __post_init__(self) -> None:
        length = len(self.token_ids)
        assert self.experts is None or len(self.experts) <= length, (len(self.experts), length)
        assert len(self.loss_mask) == len(self.sampler_logprobs) == len(self.versions) == length, "one length T"
        assert 0 < self.prompt_length <= length, (self.prompt_length, length)
        assert not self.loss_mask[: self.prompt_length].any(), "a prompt token is never trained on"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())

    @property
    def oldest_version(self) -> int:
        """Version of the oldest sampled token; -1 for an empty response."""
        sampled = self.versions[self.loss_mask]
        return int(sampled.min()) if len(sampled) else -1

    @property
    def newest_version(self) -> int:
        sampled = self.versions[self.loss_mask]
        return int(sampled.max()) if len(sampled) else -1


@dataclass(frozen=True)
class RolloutGroup:
    """The G trajectories of one prompt. The rollout worker that made it owns it; the driver knows it by its uid."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    def __reduce__(self) -> tuple[object, ...]:
        """See `_joined`."""
        rows = [(t.token_ids, t.loss_mask, t.sampler_logprobs, t.versions) for t in self.trajectories]
        others = [(t.prompt_length, t.finish_reason, t.experts) for t in self.trajectories]
        return _rollout_group, (self.prompt, *_joined(rows), others)


def _rollout_group(
    prompt: Prompt, lengths: list[int], arrays: list[np.ndarray], others: list[tuple[int, str, np.ndarray | None]],
) -> RolloutGroup:
    rows = zip(*(_split(array, lengths) for array in arrays), others, strict=True)
    return RolloutGroup(prompt, tuple(Trajectory(*row, *other) for *row, other in rows))


@dataclass(frozen=True)
class Responses:
    """What rewards see of a group.

    >>> Responses(prompt, texts=("42", "7"), prompt_lengths=(2, 2), finish_reasons=("stop", "length"), step=7,
    ...           token_ids=(np.array([5, 6, 4, 2], np.int32), np.array([5, 6, 9], np.int32)),
    ...           num_loss_tokens=np.array([2, 1])).response_ids
    [[4, 2], [9]]
    """

    prompt: Prompt
    texts: tuple[str, ...]  # all that follows the prompt, tools' turns included, without end and padding tokens
    token_ids: tuple[np.ndarray, ...]  # (T,) int32 each, prompt and response
    prompt_lengths: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    num_loss_tokens: np.ndarray  # (G,)
    step: int  # updates that the newest policy among their tokens had

    @property
    def response_ids(self) -> list[list[int]]:
        return [ids[start:].tolist() for ids, start in zip(self.token_ids, self.prompt_lengths, strict=True)]


@dataclass(frozen=True)
class Scores:
    """What the rewards say of a group.

    >>> Scores(rewards=np.array([1., 0.]), task_rewards=np.array([1., 0.]), parts={}).rewards.sum()
    1.0
    """

    rewards: np.ndarray  # (G,) float64, weighted sum of the parts (after shaping), nan where no function scored it
    task_rewards: np.ndarray  # (G,) float64, before length penalties and other shaping; what filters look at
    parts: dict[str, np.ndarray]  # name of the function or of its part ► (G,) float64, nan where it gave None


@dataclass(frozen=True)
class ScoredGroup:
    """What the driver and the trainer need to know of a group beside its tokens: small, and the same size at any
    length.

    >>> ScoredGroup(uid=17, rewards=np.array([1., 0.]), task_rewards=np.array([1., 0.]),
    ...             parts={"exact_match": np.array([1., 0.])},
    ...             num_tokens=np.array([9, 8]), num_loss_tokens=np.array([3, 2]), truncated=np.array([False, False]),
    ...             oldest_version=7).group_size
    2
    """

    uid: int
    rewards: np.ndarray  # (G,) float64, weighted sum of the parts (after shaping), nan where no function scored it
    task_rewards: np.ndarray  # (G,) float64, before length penalties and other shaping; what filters look at
    parts: dict[str, np.ndarray]  # name of the function or of its part ► (G,) float64, nan where it gave None
    num_tokens: np.ndarray  # (G,) prompt and response
    num_loss_tokens: np.ndarray  # (G,)
    truncated: np.ndarray  # (G,) bool
    oldest_version: int  # of the group's oldest token

    def __reduce__(self) -> tuple[object, ...]:
        """As lists: see `_joined`."""
        values = [values.tolist() for values in (self.rewards, self.task_rewards, *self.parts.values())]
        counts = [counts.tolist() for counts in (self.num_tokens, self.num_loss_tokens, self.truncated)]
        return _scored_group, (self.uid, tuple(self.parts), values, counts, self.oldest_version)

    @property
    def group_size(self) -> int:
        return len(self.rewards)


def _scored_group(
    uid: int, names: tuple[str, ...], values: list[list[float]], counts: list[list[int]], oldest_version: int,
) -> ScoredGroup:
    rewards, task_rewards, *parts = (np.array(of_samples, np.float64) for of_samples in values)
    num_tokens, num_loss_tokens, truncated = counts
    return ScoredGroup(uid, rewards, task_rewards, dict(zip(names, parts, strict=True)), np.array(num_tokens, np.int64),
                       np.array(num_loss_tokens, np.int64), np.array(truncated, bool), oldest_version)


@dataclass(frozen=True)
class Sample:
    """One sequence ready to be trained on. All arrays but `experts` have length T, asserted here and nowhere else.

    Supervised and preference data make Samples as well: their sampler and reference log-probs are None.
    `loss_weights` carry the aggregation: the loss of the step is the sum of weight times per-token loss.
    """

    token_ids: np.ndarray  # (T,) int32
    loss_mask: np.ndarray  # (T,) bool
    loss_weights: np.ndarray  # (T,) float32, 0 where the mask is False
    advantages: np.ndarray | None = None  # (T,) float32
    sampler_logprobs: np.ndarray | None = None  # (T,) float32
    reference_logprobs: np.ndarray | None = None  # (T,) float32
    current_version: bool = True  # every sampled token is of the trainer's present step
    experts: np.ndarray | None = None  # (M, layers, K): see Trajectory

    def __post_init__(self) -> None:
        for name in ("loss_mask", "loss_weights", "advantages", "sampler_logprobs", "reference_logprobs"):
            value = getattr(self, name)
            assert value is None or len(value) == len(self.token_ids), f"{name}: {len(value)} != {len(self.token_ids)}"

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to one prompt of which the first was preferred (tokens: prompt and response, end token included).

    >>> pair = PreferencePair(row=4, prompt_length=2, chosen_ids=np.array([5, 6, 4, 2], np.int32),
    ...                       rejected_ids=np.array([5, 6, 2], np.int32), margin=0.5)
    >>> pair.num_tokens
    7
    """

    row: int  # of the data, from 0
    prompt_length: int  # tokens that both begin with
    chosen_ids: np.ndarray  # (T,) int32
    rejected_ids: np.ndarray  # (T,) int32
    margin: float = 0.0  # by how much the first should score above the second, in the reward's unit

    def __post_init__(self) -> None:
        shortest = min(len(self.chosen_ids), len(self.rejected_ids))
        assert 0 < self.prompt_length < shortest, (self.prompt_length, shortest)

    @property
    def num_tokens(self) -> int:
        return len(self.chosen_ids) + len(self.rejected_ids)


class KeptGroup(NamedTuple):
    """A finished group whose arrays lie in a checkpoint: it need not be sampled again."""

    uid: int
    file: str  # in the checkpoint's folder of groups
    born: int  # steps done when it got its slot
    generate_s: float  # that it took


@dataclass(frozen=True)
class LoopState:
    """Where a loop stands: what a checkpoint holds beside the trainer's state.

    >>> LoopState(step=3, next_uid=96).unfinished
    ()
    """

    step: int  # steps done
    next_uid: int = 0  # the next prompt of the stream
    unfinished: tuple[int, ...] = ()  # prompts started and not trained on: they start again, but those that are kept
    prompts_dropped: int = 0
    version: int = -1  # the highest published; -1: none
    kept: tuple[KeptGroup, ...] = ()
    steps_of: Mapping[int, int] = field(default_factory=dict)  # version of a kept group's token ► the step it held


@dataclass(frozen=True)
class StepReport:
    """What a training step tells the driver: how many steps are done, and the metrics, reduced over ranks already."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)
