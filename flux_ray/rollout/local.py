"""A model in this process, without Ray: vLLM as a rollout's engine has it.

Takes:  a config, whose model, temperature and limits hold.
Gives:  `local_engine`: a LocalEngine that is to be started; its `generate` as an engine's, its `stream` piece by piece.
Knows:  vLLM reads its environment when it is imported.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from flux_ray.config import PolicyGradientConfig, changed
from flux_ray.errors import UserError
from flux_ray.lifetime import OWN_GROUP
from flux_ray.records import FINISH_LENGTH, SamplingRequest
from flux_ray.rollout.check import check_kv_cache
from flux_ray.rollout.engine import RolloutEngine, engine_env

MAX_CONTEXT = 8192  # tokens, where the config says nothing: a model's own context may ask for more KV than there is


class LocalEngine(RolloutEngine):
    """One engine that nobody sends weights to."""

    #: Whether the last stream was cut by its limit.
    was_cut = False

    async def stream(self, request: SamplingRequest) -> AsyncIterator[str]:
        """Pieces of the text of one sample, as they come. Whoever stops reading ends the request."""
        from vllm.sampling_params import RequestOutputKind

        params = self._params(request)
        params.output_kind, params.detokenize = RequestOutputKind.DELTA, True
        params.skip_special_tokens, params.logprobs = True, None
        outputs = self._vllm.generate(await self._tokens(request), params, f"chat-{next(self._request_ids)}")
        self.was_cut = False
        async with contextlib.aclosing(outputs):  # vLLM ends the request as it is closed, not when it is collected
            async for output in outputs:
                (sample,) = output.outputs
                self.was_cut = sample.finish_reason == FINISH_LENGTH
                if sample.text:
                    yield sample.text


def local_config(config: PolicyGradientConfig) -> PolicyGradientConfig:
    """With the context that the engine gets. UserError where responses leave no room in it."""
    from flux_ray.model import context_length

    context = config.rollout.max_model_len or min(context_length(str(config.model.path)), MAX_CONTEXT)
    if config.rollout.max_tokens >= context:
        raise UserError(f"rollout.max_tokens={config.rollout.max_tokens} leaves no room for a prompt in a context of "
                        f"{context} tokens: lower it, or raise rollout.max_model_len")
    return changed(config, {"rollout.max_model_len": context})


def _device(config: PolicyGradientConfig) -> str:
    """UserError for cuda where there is no GPU."""
    import torch

    if config.cluster.device == "cuda" and not torch.cuda.is_available():
        raise UserError("cluster.device=cuda, and this machine has no GPU that torch sees")
    return "cuda" if config.cluster.device != "cpu" and torch.cuda.is_available() else "cpu"


def local_engine(config: PolicyGradientConfig) -> LocalEngine:
    """An engine for what `local_config` gives. UserError where it can't hold a sequence of the whole context."""
    from flux_ray.model import resolve_dtype

    device = _device(config)
    dtype = resolve_dtype(config.model.dtype, device)
    if device == "cpu":
        check_kv_cache(str(config.model.path), context=config.rollout.max_model_len or 0, dtype_bytes=dtype.itemsize,
                       kv_cache_gib=config.rollout.kv_cache_gib)
    # VLLM_CONFIGURE_LOGGING=0: what vLLM logs goes where this process's own logging goes.
    os.environ.update(engine_env(device, config.rollout) | {"VLLM_CONFIGURE_LOGGING": "0", OWN_GROUP: "1"}
                      | config.cluster.env)
    return LocalEngine(config, index=0, device=device, dtype=str(dtype).removeprefix("torch."),
                       weights_backend="gloo" if device == "cpu" else "nccl")
