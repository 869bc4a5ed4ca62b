"""`generate`, by which a rollout function samples from the policy, for one prompt over one engine.

Takes:  a prompt, an engine, the longest response.
Gives:  `PromptGenerate`, a Generate: completions of token ids.
Knows:  every call draws afresh. The sample and its turn fix the seed, so that a run repeats.
Keeps:  how many turns each sample has had, and the step of the newest policy that answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from flux_ray.cluster.group import Actor, ActorDied, ActorError
from flux_ray.cluster.plan import ENGINE
from flux_ray.protocols import Engine
from flux_ray.records import FINISH_LENGTH, Completion, Prompt, SamplingRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CORE_DIED = "CoreDied"  # what an engine raises that lives without vLLM's own process
TURN_SEED_STRIDE = 1_000_003  # the seeds of a trajectory's later turns lie this far apart: beyond any group size
EMPTY = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), FINISH_LENGTH)


@dataclass(frozen=True)
class Limits:
    """How long a sequence may get, and how long it may take."""

    max_tokens: int  # of a response, all turns together
    context_length: int  # of prompt and response, as the engine has it
    deadline_s: float  # of one request

    def of(self, prompt: Prompt) -> Limits:
        """With the prompt's own longest response, where its set has one."""
        return self if prompt.max_tokens is None else replace(self, max_tokens=prompt.max_tokens)

    def response_tokens(self, num_tokens: int, *, prompt_length: int) -> int:
        """How many more response tokens fit after `num_tokens`, of which `prompt_length` are the prompt's."""
        used = max(0, num_tokens - prompt_length)
        return min(self.max_tokens - used, self.context_length - num_tokens)


class EngineLost(Exception):
    """The engine is gone, or doesn't compute any more: another one has to answer."""

    def __init__(self, why: str, *, incarnation: str) -> None:
        """`incarnation`: whose place another one is to take; empty: nobody's."""
        super().__init__(why)
        self.incarnation = incarnation


@dataclass
class PromptGenerate:
    """`generate` of one prompt. All turns of a sample go to one engine, which has its prefix."""

    prompt: Prompt
    engine: Actor[Engine]
    limits: Limits
    temperature: float
    tokenizer: PreTrainedTokenizerBase
    owner: str  # incarnation of the rollout worker
    step: int = 0  # of the newest policy that has answered
    lost: EngineLost | None = None  # a call failed by it, whatever the rollout function makes of that
    _turns: Counter[int] = field(default_factory=Counter)

    def restart(self) -> None:
        """The rollout function begins anew: its calls draw with the seeds that they had the first time."""
        self._turns.clear()

    async def __call__(
        self, token_ids: Sequence[int] | np.ndarray, *, n: int = 1, sample: int = 0, max_tokens: int | None = None
    ) -> list[Completion]:
        turn = max(self._turns[i] for i in range(sample, sample + n))  # vLLM draws the i-th of n with seed + i
        self._turns.update({i: turn + 1 - self._turns[i] for i in range(sample, sample + n)})
        left = self.limits.response_tokens(len(token_ids), prompt_length=len(self.prompt.token_ids))
        left = left if max_tokens is None else min(left, max_tokens)
        if left < 1:  # the response is full: an empty, truncated turn
            return [EMPTY] * n
        request = SamplingRequest(
            np.asarray(token_ids, np.int32), n, seed=self.prompt.seed + sample + turn * TURN_SEED_STRIDE,
            temperature=self.temperature, max_tokens=left, owner=self.owner)
        what = f"rollout of {self.prompt.where}"
        try:
            sampled = await self.engine.call(Engine.generate, request).within(self.limits.deadline_s, what=what)
        except ActorError as error:
            if error.role != ENGINE or not (isinstance(error, ActorDied) or error.raised == CORE_DIED):
                raise
            self.lost = EngineLost(str(error), incarnation=self.engine.incarnation)
            raise self.lost from error
        self.step = max(self.step, sampled.step)
        return list(sampled.completions)
