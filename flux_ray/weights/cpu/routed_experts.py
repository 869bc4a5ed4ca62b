"""The experts that a running vLLM model on CPU chooses, told with each request as vLLM tells them on GPUs.

Takes:  a vLLM worker, before its first request.
Gives:  `allow`, for each of vLLM's processes; `return_routed_experts`, for the workers.
Knows:  vLLM 0.32 has all parts of it, and joins them in its second model runner alone, which needs Triton. Here they
        are joined in the first one, which CPUs have: what a step is about goes in before its forward pass, and what
        the routers chose comes out with its tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Batch(NamedTuple):
    """What vLLM's connector reads of a step's requests; it runs their tokens one request after the other."""

    req_ids: list[str]
    num_computed_tokens_np: np.ndarray  # of each request, before the step
    query_start_loc_np: np.ndarray  # where its tokens begin among the step's, and at last where they end


class SecondRunner:
    """vLLM's config, as it checks it where its second runner is in use."""

    use_v2_model_runner = True

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def allow() -> None:
    """vLLM's config takes enable_return_routed_experts on CPU; all else that it needs for it is checked as ever."""
    from vllm.config import VllmConfig

    check = VllmConfig._verify_aux_output_compatibility
    if check.__module__ != __name__:  # not done yet

        def checked(config: VllmConfig) -> None:
            check(SecondRunner(config))

        VllmConfig._verify_aux_output_compatibility = checked


def return_routed_experts(worker: Any) -> None:
    """From now on the worker's model runner gives the experts of each step's tokens. Not for speculative decoding."""
    from vllm.distributed.aux_output_connector.worker import get_aux_output_connector

    runner = worker.model_runner
    connector = get_aux_output_connector(runner.get_model(), runner.vllm_config, runner.kv_cache_config)
    execute, sample = runner.execute_model, runner.sample_tokens
    taken: list[Any] = []  # what the last forward pass chose, until its tokens are sampled

    def execute_model(scheduler_output: Any, *more: Any) -> Any:
        connector.begin_step(scheduler_output.aux_output_connector_metadata)
        output = execute(scheduler_output, *more)
        if output is None:  # there was something to run, and `sample_tokens` comes next
            of, num = runner.input_batch, runner.input_batch.num_reqs
            taken[:] = [connector.prepare_output(Batch(
                of.req_ids, of.num_computed_tokens_cpu[:num].copy(), runner.query_start_loc.np[: num + 1].copy()))]
        return output

    def sample_tokens(*given: Any) -> Any:
        output = sample(*given)
        pending = taken.pop() if taken else None
        if pending is not None:  # else this worker isn't the one that answers for its engine
            num_sampled = np.array([len(tokens) for tokens in output.sampled_token_ids])
            pending.enqueue_cpu_copy(num_sampled, np.zeros_like(num_sampled))
            output.aux_output_connector_output = pending.process_output()
        return output

    runner.execute_model, runner.sample_tokens = execute_model, sample_tokens
