"""One vLLM engine as a plain class.

Takes:  SamplingRequests: tokens in; weights, through vLLM's weight-transfer framework.
Gives:  Sampled: tokens out, log-probs of the distribution sampled, the policy version of every token.
Knows:  how vLLM must be set so that its log-probs can be compared with the trainer's.
Keeps:  the running requests and the version it serves.
Never:  answers while an update is half loaded: requests wait until it is whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from flux_ray.cluster.group import Members
from flux_ray.config import PolicyGradientConfig, RolloutConfig
from flux_ray.lifetime import PLUGIN
from flux_ray.messages import Attested
from flux_ray.records import FINISH_LENGTH, FINISH_STOP, Completion, Sampled, SamplingRequest
from flux_ray.rollout.check import ENTRY_POINT, check_engine_args, check_installed
from flux_ray.rollout.core_watch import watch
from flux_ray.rollout.cpu_startup.forking import fork_engine_core
from flux_ray.rollout.known_models import engine_args_of
from flux_ray.rollout.routed_experts import experts_of, started

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

CPU_BATCHED_TOKENS = 8192  # tokens of one forward of an engine on CPU, at least
WORKER_EXTENSION = "flux_ray.weights.worker.AttestingWorker"  # by name: a part doesn't import another
LOOK_EVERY_S = 1.0  # whether vLLM's process lives, while a call waits for it

T = TypeVar("T")


class CoreDied(RuntimeError):
    """vLLM's own process has died: this engine will answer nothing more."""


def engine_env(device: str, rollout: RolloutConfig) -> dict[str, str]:
    """Environment of the engine's process, set before vLLM is imported there."""
    env = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_PLUGINS": f"{ENTRY_POINT},{PLUGIN}"}
    if device == "cpu":
        # Two OpenMP pools on one core are twenty times slower than one: each process computes with one thread, unbound.
        env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if rollout.engine_args.get("enforce_eager", True):
            # Else vLLM has a compiler write a line of its sampling at the first request, and again in mid-run.
            env["TORCH_COMPILE_DISABLE"] = "1"
        else:  # as vLLM sets them: too late for a process that has imported the compiler
            env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
        if rollout.tensor_parallel_size == 1:
            # The engine core computes itself: one process fewer starts and holds vLLM. Its OpenMP is set above.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


class RolloutEngine:
    """vLLM's AsyncLLM with the one request form that we need.

    `index` tells engines apart (logs, ranks of the weight update). Call `start` before anything else, `close` at
    the end.
    """

    def __init__(
        self, config: PolicyGradientConfig, *, index: int, device: str, dtype: str, weights_backend: str,
        gpu_share: float = 1.0,
    ) -> None:
        self._config = config
        self._index = index
        self._device = device
        self._dtype = dtype
        self._weights_backend = weights_backend
        self._gpu_share = gpu_share  # below 1: trainer and reference have the rest of the GPU
        self._engine: AsyncLLM | None = None
        self._version = 0
        self._step_of = {0: 0}  # version ► updates that it had
        self._running: dict[asyncio.Task[object], str] = {}  # requests, with who waits for each
        self._epoch = 0  # of the members that it knows
        self._serving = asyncio.Event()  # not paused for an update
        self._serving.set()
        self._has_weights = asyncio.Event()
        self._has_weights.set()
        self._staged = False  # new weights come in beside running requests
        self._is_wrong = False  # the last update left it with other weights than were sent
        self._request_ids = itertools.count()

    @property
    def _transfer(self) -> str:
        """The name that vLLM knows the worker's end of the weight channel by; the weights folder registers ours."""
        if self._config.weights.staging == "device":
            return f"{self._weights_backend}_device"
        return "ipc_plain" if self._weights_backend == "ipc" else self._weights_backend

    @property
    def _vllm(self) -> AsyncLLM:
        assert self._engine is not None, "it has not started"
        return self._engine

    async def start_for_training(self) -> None:
        """`start`. Requests wait until the first update: the model's folder holds the weights of the run's start."""
        self._has_weights.clear()
        await self.start()

    async def start(self) -> None:
        """Load the model, unless that is done."""
        if self._engine is not None:
            return
        if self._device == "cpu":
            fork_engine_core()
        from flux_ray.model.stops import stop_token_ids

        check_installed()
        returns_experts = self._config.rollout.return_experts or self._config.algo.router_replay
        self._engine = await started(self._engine_args(), device=self._device, returns_experts=returns_experts)
        await self._vllm.update_weight_version(str(self._version))
        self._watch = watch(lambda: bool(self._running) and self._serves)
        self._stop_ids = stop_token_ids(self._config.model.path, self._vllm.get_tokenizer())

    def _engine_args(self) -> dict[str, object]:
        from vllm.config import WeightTransferConfig

        from flux_ray.model import context_length

        config = self._config.rollout
        args: dict[str, object] = {
            "model": self._config.model.path,
            "tokenizer": self._config.model.tokenizer or self._config.model.path,
            "dtype": self._dtype,
            "seed": self._config.seed,
            "max_model_len": config.max_model_len,
            "max_num_seqs": config.max_num_seqs,
            "tensor_parallel_size": config.tensor_parallel_size,
            # Raw log-probs (vLLM's default) ignore the temperature: the trainer's are those of the distribution
            # sampled.
            "logprobs_mode": "processed_logprobs",
            # Otherwise a model's own top_p or top_k would enter in silence. It keeps its further end tokens out too, so
            # that each request names them (stop_token_ids), or a chat's response would never end.
            "generation_config": "vllm",
            "weight_transfer_config": WeightTransferConfig(backend=self._transfer),
            "worker_extension_cls": WORKER_EXTENSION,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
        if self._config.driver.max_staleness:
            # The trainer waits for the probe: by age alone the probe would come after all requests that wait here.
            args["scheduling_policy"] = "priority"
        if self._device == "cpu":
            args["kv_cache_memory_bytes"] = int(config.kv_cache_gib * 2**30)
            # A prefill cut in two makes vLLM rewind the seed's generator; on CPU it can't and the engine dies. Prompts
            # (and requests that prefill again after an update) therefore go whole; a batch has room for the longest.
            args["enable_chunked_prefill"] = False
            longest = config.max_model_len or context_length(str(self._config.model.path))
            args["max_num_batched_tokens"] = max(CPU_BATCHED_TOKENS, longest)
            # Compiling asks for a compiler and takes a start 20 s more, for a seventh of a decoding step in bf16.
            args["enforce_eager"] = True
            args["disable_custom_all_reduce"] = True
        elif self._gpu_share < 1:
            args["gpu_memory_utilization"] = self._gpu_share
        if config.tensor_parallel_size > 1:
            # Inside a placement group vLLM would ask Ray for actors of its own, on GPUs that this one has already.
            args["distributed_executor_backend"] = "mp"
        elif self._device == "cpu":
            args["distributed_executor_backend"] = "uni"  # one process fewer
        check_engine_args(config)
        known = engine_args_of(str(self._config.model.path))
        overrides = known.get("hf_overrides", {}) | (config.engine_args.get("hf_overrides") or {})
        return args | known | config.engine_args | ({"hf_overrides": overrides} if overrides else {})

    async def meet(self, members: Members) -> None:
        """Cancel the requests of rollout workers that are no members any more: nobody waits for them."""
        if members.epoch < self._epoch:  # newer members came first
            return
        self._epoch = members.epoch
        for task, owner in list(self._running.items()):
            if owner not in members.incarnations:
                task.cancel()

    async def context_length(self) -> int:
        """Tokens that a sequence may have, the prompt's included."""
        return int(self._vllm.model_config.max_model_len)

    async def generate(self, request: SamplingRequest) -> Sampled:
        """Samples after the request's tokens."""
        final = None
        task = asyncio.current_task()
        assert task is not None
        self._running[task] = request.owner
        try:
            await self._has_weights.wait()
            tokens = await self._tokens(request)
            request_id, priority = f"{self._index}-{next(self._request_ids)}", self._priority(request)
            with _vllm_alive():
                async for output in self._vllm.generate(tokens, self._params(request), request_id, priority=priority):
                    final = output
        finally:
            del self._running[task]
        assert final is not None and final.finished
        completions = tuple(completion_of(output, prompt_length=len(request.token_ids))
                            for output in sorted(final.outputs, key=lambda output: output.index))
        newest = max((int(c.versions.max()) for c in completions if c.num_tokens), default=self._version)
        return Sampled(completions, self._step_of[newest])

    def _priority(self, request: SamplingRequest) -> int:
        """The lowest goes first; 0 for all where vLLM goes by age."""
        return -1 if request.probes and self._config.driver.max_staleness else 0

    def _params(self, request: SamplingRequest) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        config, probes = self._config.rollout, request.probes
        past_the_end = config.ignore_eos or probes
        return SamplingParams(
            n=request.n,
            seed=request.seed,
            temperature=request.temperature,
            top_p=1.0 if probes else config.top_p,
            top_k=0 if probes else config.top_k,
            min_p=0.0 if probes else config.min_p,
            max_tokens=request.max_tokens,
            stop=None if probes else list(config.stop) or None,
            stop_token_ids=[] if past_the_end else self._stop_ids,
            ignore_eos=past_the_end,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(config.stop) and not probes,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    @property
    def _serves(self) -> bool:
        return self._serving.is_set() and self._has_weights.is_set()

    async def _tokens(self, request: SamplingRequest) -> TokensPrompt:
        from vllm.inputs import TokensPrompt

        tokens = TokensPrompt(prompt_token_ids=request.token_ids.tolist())
        if self._config.rollout.kv_after_update == "keep":
            await self._serving.wait()  # for an update to end: its version will be this request's
            tokens["cache_salt"] = str(self._version)  # a prefix computed by older weights is never hit
        if request.probes:
            tokens["cache_salt"] = f"probe {self._version}"  # so that samples don't depend on probes
        return tokens

    # The weight update, in the order of its calls, with the names of vLLM's framework.

    async def init_weight_transfer_engine(self, init_info: Mapping[str, object]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._staged = self._config.weights.staging == "device"
        request = WeightTransferInitRequest(init_info=init_info)
        await self._answered(self._vllm.init_weight_transfer_engine(request))

    async def set_staged(self, staged: bool) -> None:
        """What all members of a gloo channel have agreed on."""
        self._staged = staged

    async def start_weight_update(self) -> None:
        """Requests wait from here on, unless the update is staged."""
        if not self._staged:
            await self._answered(self._pause())
        await self._answered(self._vllm.start_weight_update())

    async def update_weights(self, update_info: object) -> None:
        await self._answered(self._receive(update_info))

    async def begin_weight_update(self, update_info: object) -> None:
        """start_weight_update and update_weights in one."""
        if not self._staged:
            await self._answered(self._pause())
        await self._answered(_in_a_row(self._vllm.start_weight_update(), self._receive(update_info)))

    async def finish_weight_update(self, version: int, step: int, sent: Mapping[str, int]) -> Attested:
        """Serve `version`, the weights of that step, from now on; `sent` are the checksums of its parameters.

        Gives the version that the engine core attests, and what the workers find wrong. An engine with anything wrong
        stays paused: until it has the weights again, nothing is sampled.
        """
        if self._staged:
            await self._answered(self._pause())
        self._step_of[version] = step
        found = await self._answered(self._vllm.collective_rpc("finish_and_attest", args=(dict(sent),)))
        await self._answered(self._vllm.update_weight_version(str(version)))
        self._version = version
        self._has_weights.set()
        label = str(await self._answered(self._vllm.get_weight_version()))  # later it would wait for a forward pass
        wrong = tuple(dict.fromkeys(name for of_worker in found for name in of_worker))
        self._is_wrong = bool(wrong) or label != str(version)
        if not self._is_wrong:
            await self._answered(self._vllm.resume_generation())
            self._serving.set()
        return Attested(label, wrong)

    async def finish_staged_update(
        self, num_rounds: int, version: int, step: int, sent: Mapping[str, int],
    ) -> Attested:
        """As finish_weight_update, for an update that has come and must first be loaded, in so many rounds.

        Running requests go on between two rounds.
        """
        for _ in range(num_rounds if self._device == "cpu" else 0):  # a GPU loads in no time
            await self.update_weights({})
        return await self.finish_weight_update(version, step, sent)

    async def abandon_update(self) -> bool:
        """Forget an update that broke off, and go on with the weights of before.

        False where the model may be loaded in part: this engine must not serve any more. An engine that is asked in
        vain, because no update was under way, is as good as before.
        """
        if not self._staged or self._is_wrong:
            return self._serving.is_set()  # else it was paused, and loads as buckets come
        with contextlib.suppress(Exception):  # vLLM ends an update at the first call that fails, and this one does
            await self._answered(self._receive({"abandoned": True}))
        await self._answered(self._vllm.resume_generation())
        self._serving.set()
        return True

    async def _receive(self, update_info: object) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._vllm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def _pause(self) -> None:
        """Freeze running requests; with kv_after_update=recompute they prefill again, under the new weights."""
        self._serving.clear()
        clear = self._config.rollout.kv_after_update == "recompute"
        # pause_generation would also sleep for 20 ms, and clear a cache of images, which we don't have.
        await self._vllm.engine_core.pause_scheduler_async(mode="keep", clear_cache=clear)

    async def _answered(self, call: Awaitable[T]) -> T:
        """What vLLM's own process answers; RuntimeError soon after that process has died.

        When it dies, vLLM fails the requests, and leaves the other calls waiting for ever.
        """
        answer = asyncio.ensure_future(call)
        try:
            while not answer.done() and not self._vllm.errored:
                await asyncio.wait({answer}, timeout=LOOK_EVERY_S)
            with _vllm_alive():
                if not answer.done():
                    raise self._vllm.dead_error
                return await answer
        finally:
            answer.cancel()

    async def close(self) -> None:
        """End vLLM's processes."""
        if self._engine is not None:
            # A single process on CPU has nothing to give back, and would take seconds to end by itself.
            alone = self._device == "cpu" and self._config.rollout.tensor_parallel_size == 1
            self._watch.cancel()
            self._vllm.shutdown(timeout=0.0 if alone else None)
            self._engine = None


async def _in_a_row(*calls: Awaitable[object]) -> None:
    """Send the calls in this order, without waiting in between: they wait for one forward pass together."""
    await asyncio.gather(*calls)


@contextmanager
def _vllm_alive() -> Iterator[None]:
    """RuntimeError in a few words where vLLM's own process is dead: its text points at a stack trace in the log."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError:
        raise CoreDied("the process in which vLLM computes died") from None


def completion_of(output: CompletionOutput, *, prompt_length: int) -> Completion:
    """A Completion from vLLM's output: log-prob and version of each sampled token."""
    token_ids = np.asarray(output.token_ids, np.int32)
    flat = output.logprobs
    # Position i holds the sampled token first.
    logprobs = np.asarray([flat.logprobs[i] for i in flat.start_indices], np.float32)
    versions = np.full(len(token_ids), -1, np.int32)
    for span in output.weight_versions or ():
        versions[span.start : span.end] = int(span.version)
    assert (versions >= 0).all(), f"vLLM names no version of some tokens: {output.weight_versions}"
    assert len(logprobs) == len(token_ids), (len(logprobs), len(token_ids))
    reason = FINISH_LENGTH if output.finish_reason == "length" else FINISH_STOP
    experts = experts_of(output, num_tokens=prompt_length + len(token_ids))
    return Completion(token_ids, logprobs, versions, reason, experts)
