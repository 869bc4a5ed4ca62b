"""Runs a user's rollout function in a child process, which it shares with those of other groups.

Takes:  the function's name and users' files; for each group a prompt and `generate`.
Gives:  SandboxedRollout, a Rollout.
Knows:  where a child ends or passes the deadline, each group in it gets a second try, in a child of its own.
Never:  runs users' code in this process.
"""

from __future__ import annotations

import asyncio
from typing import Any

from flux_ray.config import PolicyGradientConfig
from flux_ray.records import Prompt, Trajectory
from flux_ray.rollout.environments.child import plain
from flux_ray.rollout.functions import Generate
from flux_ray.rollout.generate import PromptGenerate
from flux_ray.sandbox import Child, ChildEnded, Entry, warm_up

SECOND_TRIES_AT_ONCE = 2  # children with one group each, beside the one that all others share
PRELOADED = ("flux_ray.rollout.environments.child", "transformers.models.auto.tokenization_auto")


class SetAside(RuntimeError):
    """The group's rollout ended or blocked its process, and once more when it was alone there."""


class SandboxedRollout:
    """Call it as the function itself. `start` beforehand; `close` at the end."""

    def __init__(self, config: PolicyGradientConfig, *, tokenizer_path: str, packed: bytes | None = None) -> None:
        self._function, self._deadline_s = config.rollout.function, config.rollout.deadline_s
        self._start_deadline_s = config.cluster.start_deadline_s
        self._entry = Entry("flux_ray.rollout.environments.child:make", {
            "function": self._function, "packed": packed, "plugins": list(config.plugins),
            "tokenizer_path": tokenizer_path})
        self._child: Child | None = None
        self._starting = asyncio.Lock()
        self._second_tries = asyncio.Semaphore(SECOND_TRIES_AT_ONCE)

    async def start(self) -> None:
        await asyncio.to_thread(warm_up, PRELOADED)
        await self._shared()

    async def _shared(self) -> Child:
        async with self._starting:
            if self._child is None or self._child.ended:
                self._child = await self._new()
            return self._child

    async def _new(self) -> Child:
        return await Child.start(self._entry, deadline_s=self._start_deadline_s)

    async def __call__(self, prompt: Prompt, generate: PromptGenerate) -> list[Trajectory]:
        """The function's trajectories. Raises what it raises; SetAside where its process ends, twice."""
        try:
            return await self._run(await self._shared(), prompt, generate)
        except ChildEnded as error:
            first = error
        async with self._second_tries:
            alone = await self._new()
            generate.restart()
            try:
                return await self._run(alone, prompt, generate)
            except ChildEnded as second:
                row = prompt.where
                raise SetAside(f"rollout.function={self._function}, {row}: {first}; in a process of its own: "
                               f"{second}") from second
            finally:
                alone.kill("its group has ended")

    async def _run(self, child: Child, prompt: Prompt, generate: Generate) -> list[Trajectory]:
        async def answer(arguments: dict[str, Any]) -> list[dict[str, object]]:
            return [plain(completion) for completion in await generate(arguments.pop("token_ids"), **arguments)]

        try:
            async with asyncio.timeout(self._deadline_s) as limit:
                given = await child.call(plain(prompt), answer=answer)
        except TimeoutError:
            if not limit.expired():  # an engine's
                raise
            why = f"a rollout in it took longer than rollout.deadline_s={self._deadline_s:g} s"
            child.kill(f"the process in which it ran was ended: {why}")
            raise ChildEnded(f"it took longer than rollout.deadline_s={self._deadline_s:g} s") from None
        return [Trajectory(**trajectory) for trajectory in given]

    def close(self) -> None:
        if self._child is not None:
            self._child.kill("the run has ended")
