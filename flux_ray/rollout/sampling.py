"""Samples a group, or a part of one: calls the rollout function over the engine that was chosen.

Takes:  an Assignment; who is alive.
Gives:  its trajectories, and how many updates the newest policy among their tokens had.
Knows:  single_turn runs here, any other rollout function in a child process; each has rollout.deadline_s.
Keeps:  the sandbox, and how long a sequence may get.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from flux_ray.cluster.group import Actor, ActorDied, Members, first_failure
from flux_ray.cluster.plan import ENGINE
from flux_ray.config import PolicyGradientConfig
from flux_ray.errors import UserError
from flux_ray.messages import PROBE_TOKENS, Assignment
from flux_ray.protocols import Engine
from flux_ray.records import Prompt, RolloutGroup, SamplingRequest, Trajectory
from flux_ray.rollout.environments import SandboxedRollout
from flux_ray.rollout.functions import Rollout, one_turn, single_turn
from flux_ray.rollout.generate import EngineLost, Limits, PromptGenerate
from flux_ray.rollout.texts import texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Sampling:
    def __init__(
        self, config: PolicyGradientConfig, *, tokenizer_path: str, tokenizer: PreTrainedTokenizerBase | None = None,
        end_ids: Collection[int] = (), function: bytes | None = None,
    ) -> None:
        """`tokenizer`: the one at the path, where it is read already. `end_ids`: tokens that end a response.
        `function`: the rollout itself, where no process can import it."""
        self._config, self._tokenizer = config, tokenizer or _load_tokenizer(tokenizer_path)
        self._end_ids = end_ids
        self._sandbox: SandboxedRollout | None = None
        if config.rollout.function != "single_turn":
            self._sandbox = SandboxedRollout(config, tokenizer_path=tokenizer_path, packed=function)
        self._function: Rollout = single_turn  # what runs in this process
        self._limits: Limits | None = None

    def decode(self, token_ids: list[np.ndarray]) -> list[str]:
        return texts_of(token_ids, self._tokenizer, end_ids=self._end_ids,
                        skip_special_tokens=self._config.rollout.skip_special_tokens)

    async def start(self, members: Members) -> None:
        """Ask an engine for its context, and start the sandbox where there is one."""
        rollout, deadline_s = self._config.rollout, self._config.cluster.start_deadline_s
        context_length = await _first_answer(members.of(ENGINE), deadline_s)
        # The group's own deadline passes first, and its error names the prompt; this one is for a silent engine.
        self._limits = Limits(rollout.max_tokens, context_length, rollout.deadline_s + self._config.weights.deadline_s)
        if self._sandbox is not None:
            await self._sandbox.start()

    async def sample(self, assignment: Assignment, members: Members, owner: str) -> tuple[list[Trajectory], int]:
        """Trajectories of all samples of the assignment's prompt, and the step of the newest policy among their tokens.

        Raises EngineLost; what the rollout function raises; TimeoutError after rollout.deadline_s; UserError for a
        wrong number.
        """
        assert self._limits is not None, "it has not started"
        prompt, config = assignment.prompt, self._config.rollout
        temperature = config.temperature if assignment.temperature is None else assignment.temperature
        engine = members.of(ENGINE)[assignment.engine].together()
        if assignment.incarnation not in ("", engine.incarnation):
            # The new one would answer once it has the weights, for which a deterministic run may be waiting for this.
            raise EngineLost(f"another engine {assignment.engine} stands there by now", incarnation="")
        generate = PromptGenerate(prompt, engine, self._limits.of(prompt), temperature, self._tokenizer, owner)
        try:
            if self._sandbox is None:
                trajectories = await self._within_deadline(prompt, generate, assignment.engine)
            else:
                trajectories = await self._sandbox(prompt, generate)
        except Exception:
            if generate.lost is None:
                raise
        if generate.lost is not None:  # even where users' code has gone on without an answer
            raise generate.lost
        if len(trajectories) != prompt.num_samples:
            raise UserError(
                f"rollout.function={config.function} gave {len(trajectories)} trajectories for row {prompt.row + 1} "
                f"(from 1); it must give prompt.num_samples={prompt.num_samples}")
        if self._config.returned_experts and any(t.experts is None and t.num_loss_tokens for t in trajectories):
            raise UserError(f"rollout.function={config.function} gave a trajectory without the experts of its tokens, "
                            f"which {self._config.returned_experts} needs: make it by flux_ray.rollout.functions.Turns")
        return trajectories, generate.step

    async def _within_deadline(self, prompt: Prompt, generate: PromptGenerate, engine: int) -> list[Trajectory]:
        deadline_s = self._config.rollout.deadline_s
        try:
            async with asyncio.timeout(deadline_s) as limit:
                return await self._function(prompt, generate)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"engine {engine}: {prompt.where} took longer than "
                               f"rollout.deadline_s={deadline_s:g} s") from None

    async def probe(self, prompts: Sequence[Prompt], engine: int, members: Members, owner: str) -> list[RolloutGroup]:
        """A few tokens after each prompt, all sampled by the weights that the engine serves now."""
        return list(await first_failure([self._probe(prompt, engine, members, owner) for prompt in prompts]))

    async def _probe(self, prompt: Prompt, engine: int, members: Members, owner: str) -> RolloutGroup:
        assert self._limits is not None, "it has not started"
        left = self._limits.context_length - len(prompt.token_ids)
        request = SamplingRequest(prompt.token_ids, prompt.num_samples, seed=prompt.seed,
                                  temperature=self._config.rollout.temperature, max_tokens=min(PROBE_TOKENS, left),
                                  probes=True, owner=owner)
        call = members.of(ENGINE)[engine].call(Engine.generate, request)
        sampled = await call.within(self._limits.deadline_s, what="probe")
        return RolloutGroup(prompt, tuple(one_turn(prompt, completion) for completion in sampled.completions))

    def close(self) -> None:
        if self._sandbox is not None:
            self._sandbox.close()


async def _first_answer(engines: Sequence[Actor[Engine]], deadline_s: float) -> int:
    """What the first one that lives has for its context."""
    *others, last = engines
    for engine in others:
        with contextlib.suppress(ActorDied):
            return await engine.call(Engine.context_length).within(deadline_s)
    return await last.call(Engine.context_length).within(deadline_s)


def _load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # seconds to import

    return AutoTokenizer.from_pretrained(path)
