"""Engines that tell which experts of a mixture their model chose.

Takes:  options of vLLM; vLLM's outputs.
Gives:  `started`, an AsyncLLM, which tells them where it is asked to; `experts_of` a sample; `check_returned`.
Knows:  vLLM 0.32 has it as an option where its second model runner is in use, which is on GPUs. On CPU its worker is
        told (weights/worker.py).
Never:  imports vLLM before an engine starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from flux_ray.config import PolicyGradientConfig
from flux_ray.errors import UserError

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

#: Options of vLLM with which no experts are returned, as they may not be.
WITHOUT = {"enable_prefix_caching": (False,), "speculative_config": ()}


def check_returned(config: PolicyGradientConfig) -> None:
    """UserError for an option of vLLM that goes with no experts, where engines are asked for them."""
    for name, refused in WITHOUT.items() if config.returned_experts else ():
        value = config.rollout.engine_args.get(name)
        if value in refused or (value is not None and not refused):
            raise UserError(f"{config.returned_experts} with rollout.engine_args.{name}={value!r}: vLLM doesn't give "
                            "the experts of every token then: leave one out")


async def started(args: Mapping[str, object], *, device: str, returns_experts: bool) -> AsyncLLM:
    """An engine with these options of AsyncEngineArgs."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    more = {"enable_return_routed_experts": True} if returns_experts else {}
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**args, **more))
    if returns_experts and device == "cpu":
        await engine.collective_rpc("return_routed_experts")
    return engine


def experts_of(output: CompletionOutput, *, num_tokens: int) -> np.ndarray | None:
    """(num_tokens - 1, layers, K) of a sample's tokens, its prompt's among them; None where they weren't asked for."""
    experts = output.routed_experts
    assert experts is None or len(experts) == num_tokens - 1, f"{len(experts)} rows of experts for {num_tokens} tokens"
    return experts
