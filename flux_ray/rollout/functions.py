"""What a rollout is: `async def rollout(prompt, generate) -> list[Trajectory]`.

Takes:  a Prompt, and `generate(token_ids, n=…, sample=…) -> list[Completion]` over the engine that runs it.
Gives:  `single_turn`; `Turns`, which puts a Trajectory together turn by turn; `register_rollout`, `get_rollout`.
Knows:  tokens in, tokens out: what was sampled is never decoded and encoded again.
Never:  trains on what the policy did not sample: a tool's tokens enter with a mask of False.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from flux_ray.cluster.functions import pack
from flux_ray.errors import UserError, unknown
from flux_ray.plugins import HANDED_OVER, load_function, same_function
from flux_ray.records import Completion, Prompt, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_SAMPLED = -1  # the version of a token that no policy sampled


class Generate(Protocol):
    """Samples from the policy.

    `sample` says which of the group's trajectories asks: it fixes the seed, so that a run repeats. `max_tokens`: the
    most of this turn; None: what earlier turns have left of rollout.max_tokens.
    """

    tokenizer: PreTrainedTokenizerBase

    async def __call__(
        self, token_ids: Sequence[int] | np.ndarray, *, n: int = 1, sample: int = 0, max_tokens: int | None = None
    ) -> list[Completion]: ...


Rollout = Callable[[Prompt, Generate], Awaitable[list[Trajectory]]]


class Turns:
    """One trajectory in the making.

    >>> turns = Turns(prompt.token_ids)
    >>> turns.sampled(completion)          # the policy's own tokens: trained on
    >>> turns.observed([8, 9])             # a tool's answer: seen, not trained on
    >>> turns.finish()                     # the Trajectory
    """

    def __init__(self, prompt_ids: Sequence[int] | np.ndarray) -> None:
        self._prompt_length = len(prompt_ids)
        self._ids = [np.asarray(prompt_ids, np.int32)]
        self._masks = [np.zeros(len(prompt_ids), bool)]
        self._logprobs = [np.zeros(len(prompt_ids), np.float32)]
        self._versions = [np.full(len(prompt_ids), NOT_SAMPLED, np.int32)]
        self._finish_reason = "stop"
        self._experts: list[np.ndarray] = []

    @property
    def token_ids(self) -> np.ndarray:
        """All tokens so far: what to generate from next."""
        return np.concatenate(self._ids)

    def sampled(self, completion: Completion) -> None:
        self._add(completion.token_ids, True, completion.logprobs, completion.versions)
        self._finish_reason = completion.finish_reason
        self._add_experts(completion)

    def observed(self, token_ids: Sequence[int] | np.ndarray) -> None:
        num = len(token_ids)
        self._add(token_ids, False, np.zeros(num), np.full(num, NOT_SAMPLED))

    def _add_experts(self, completion: Completion) -> None:
        """Of the tokens since the last turn. Where the policy was shown others than `token_ids`, they are unknown."""
        experts = completion.experts
        if experts is not None and len(experts) + 1 == sum(map(len, self._ids)):
            self._experts.append(experts[sum(map(len, self._experts)) :])

    def _add(
        self, ids: Sequence[int] | np.ndarray, trained: bool, logprobs: np.ndarray, versions: np.ndarray
    ) -> None:
        self._ids.append(np.asarray(ids, np.int32))
        self._masks.append(np.full(len(ids), trained, bool))
        self._logprobs.append(np.asarray(logprobs, np.float32))
        self._versions.append(np.asarray(versions, np.int32))

    def finish(self) -> Trajectory:
        return Trajectory(
            self.token_ids,
            np.concatenate(self._masks),
            np.concatenate(self._logprobs),
            np.concatenate(self._versions),
            self._prompt_length,
            self._finish_reason,
            np.concatenate(self._experts) if self._experts else None,
        )


async def single_turn(prompt: Prompt, generate: Generate) -> list[Trajectory]:
    """One request for the whole group: G responses to the prompt."""
    return [one_turn(prompt, completion) for completion in await generate(prompt.token_ids, n=prompt.num_samples)]


def one_turn(prompt: Prompt, completion: Completion) -> Trajectory:
    """The prompt, and all that the policy said to it."""
    turns = Turns(prompt.token_ids)
    turns.sampled(completion)
    return turns.finish()


_ROLLOUTS: dict[str, Rollout] = {"single_turn": single_turn}


def register_rollout(name: str) -> Callable[[Rollout], Rollout]:
    """Register a rollout for `rollout.function`.

    Raises:
        UserError: The name is taken.
    """

    def register(function: Rollout) -> Rollout:
        if name in _ROLLOUTS and not same_function(_ROLLOUTS[name], function):
            raise UserError(f"a rollout named {name!r} is registered already")
        _ROLLOUTS[name] = function
        return function

    return register


def list_rollouts() -> list[str]:
    """Names for `rollout.function`: ours, and those that plugins registered."""
    return sorted(_ROLLOUTS)


def packed_rollout(name: str) -> bytes | None:
    """The rollout as bytes, where it was handed over; None for one that other processes import."""
    if not name.startswith(HANDED_OVER):
        return None
    return pack(load_function(name, option="rollout.function"), name=name)


def get_rollout(name: str) -> Rollout:
    """The rollout of that name, or `path/to/file.py:function`. UserError: an unknown name, a file without it."""
    if ":" in name:
        return load_function(name, option="rollout.function")
    if name not in _ROLLOUTS:
        raise unknown("rollout.function", name, _ROLLOUTS)
    return _ROLLOUTS[name]
