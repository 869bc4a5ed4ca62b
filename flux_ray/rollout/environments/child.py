"""Runs a rollout function in its child process.

Takes:  the function's name, users' files, the tokenizer's path; then a prompt a call.
Gives:  `make`, the entry point of the sandbox; records as plain values and back.
Knows:  `generate` asks the parent, which has the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flux_ray.cluster.functions import unpack
from flux_ray.errors import UserError
from flux_ray.plugins import hand_over, load_plugins
from flux_ray.records import Completion, Prompt, Trajectory
from flux_ray.rollout.functions import get_rollout
from flux_ray.sandbox.child import Ask, Handler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def plain(record: Prompt | Completion | Trajectory) -> dict[str, object]:
    return dict(vars(record))


def make(*, function: str, packed: bytes | None, plugins: list[str], tokenizer_path: str) -> Handler:
    """The handler of a prompt: the trajectories that the function makes of it. `packed`: itself, where none imports it.
    """
    from transformers import AutoTokenizer

    load_plugins(plugins)
    if packed is not None:
        hand_over(unpack(packed), name=function)
    rollout = get_rollout(function)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)

    async def run(payload: dict[str, Any], ask: Ask) -> list[dict[str, object]]:
        trajectories = await rollout(Prompt(**payload), AskingGenerate(ask, tokenizer))
        if not isinstance(trajectories, (list, tuple)) or not all(isinstance(t, Trajectory) for t in trajectories):
            raise UserError(f"rollout.function={function} gave {type(trajectories).__name__}: it must give a list of "
                            "Trajectory (flux_ray.rollout.functions.Turns makes one)")
        return [plain(trajectory) for trajectory in trajectories]

    return run


class AskingGenerate:
    """See rollout.functions.Generate."""

    def __init__(self, ask: Ask, tokenizer: PreTrainedTokenizerBase) -> None:
        self._ask, self.tokenizer = ask, tokenizer

    async def __call__(
        self, token_ids: Sequence[int] | np.ndarray, *, n: int = 1, sample: int = 0, max_tokens: int | None = None
    ) -> list[Completion]:
        arguments = {"token_ids": np.asarray(token_ids, np.int32), "n": n, "sample": sample, "max_tokens": max_tokens}
        return [Completion(**completion) for completion in await self._ask(arguments)]
