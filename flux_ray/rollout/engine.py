"""One vLLM engine as a plain class.

Takes:  Prompts; weights, through vLLM's weight-transfer framework.
Gives:  RolloutGroups: token ids, log-probs of the distribution sampled, the policy version of every token.
Knows:  how vLLM must be set so that its log-probs can be compared with the trainer's.
Keeps:  the running requests and the version it serves.
Never:  answers while half an update is loaded: requests wait until it is whole.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from flux_ray.config import Config, RolloutConfig
from flux_ray.errors import UserError
from flux_ray.lifetime import PLUGIN
from flux_ray.records import FINISH_LENGTH, FINISH_STOP, Completion, Prompt, RolloutGroup
from flux_ray.rollout.check import ENTRY_POINT, check_engine_args, check_installed
from flux_ray.rollout.forking import fork_engine_core
from flux_ray.rollout.functions import get_rollout, one_turn

PROBE_SAMPLES, PROBE_TOKENS = 4, 4  # enough to show weights that differ; few steps, for the trainer waits for them
CPU_BATCHED_TOKENS = 8192  # tokens of one forward of an engine on CPU, at least
LOOK_EVERY_S = 1.0  # whether vLLM's process lives, while it is waited for
TURN_SEED_STRIDE = 1_000_003  # the seeds of a trajectory's later turns lie this far apart: beyond any group size

T = TypeVar("T")


def engine_env(device: str, rollout: RolloutConfig) -> dict[str, str]:
    """Environment of the engine's process, set before vLLM is imported there."""
    env = {"VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_PLUGINS": f"{ENTRY_POINT},{PLUGIN}"}
    if device == "cpu":
        # Two OpenMP pools on one core are twenty times slower than one: each process computes with one thread, unbound.
        env |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if rollout.engine_args.get("enforce_eager", True):
            # vLLM would have a compiler write a line of its sampling at the first request, and again in mid-run.
            env["TORCH_COMPILE_DISABLE"] = "1"
        else:  # as vLLM sets them: too late for a process that has imported the compiler
            env |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
        if rollout.tensor_parallel_size == 1:
            # Lets the engine core compute itself: a process fewer to start and to hold vLLM. Its OpenMP is set above.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env


class RolloutEngine:
    """vLLM's AsyncLLM with the one request form that we need.

    `index` tells engines apart (logs, ranks of the weight update). Call `start` before anything else, `close` at
    the end.
    """

    def __init__(
        self, config: Config, *, index: int, device: str, dtype: str, weights_backend: str, gpu_share: float = 1.0
    ) -> None:
        self._config = config
        self._index = index
        self._device = device
        self._dtype = dtype
        self._weights_backend = weights_backend
        self._gpu_share = gpu_share  # below 1: trainer and reference have the rest of the GPU
        self._engine: Any = None
        self._tokenizer: Any = None
        self._version = 0
        self._serving = asyncio.Event()  # not paused for an update
        self._serving.set()
        self._staged = False  # new weights come in beside running requests
        self._request_ids = itertools.count()
        self._rollout = get_rollout(config.rollout.function)

    @property
    def _transfer(self) -> str:
        """The name that vLLM knows the worker's end of the wire by; the weights room registers those that are ours."""
        if self._config.weights.staging == "device":
            return f"{self._weights_backend}_device"
        return "ipc_plain" if self._weights_backend == "ipc" else self._weights_backend

    async def start(self) -> dict[str, Any]:
        """Load the model. Gives the context length in tokens."""
        if self._device == "cpu":
            fork_engine_core()
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from flux_ray.model.stops import stop_token_ids

        check_installed()
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._engine_args()))
        self._tokenizer = self._engine.get_tokenizer()
        await self._engine.update_weight_version(str(self._version))
        self._max_model_len = int(self._engine.model_config.max_model_len)
        self._stop_ids = stop_token_ids(self._config.model.path, self._tokenizer)
        return {"context_length": self._max_model_len}

    def _engine_args(self) -> dict[str, Any]:
        from vllm.config import WeightTransferConfig

        from flux_ray.model import context_length

        config = self._config.rollout
        args: dict[str, Any] = {
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
            "enable_prefix_caching": True,
            "disable_log_stats": True,
        }
        if self._config.driver.max_staleness:
            # For the probe, which the trainer waits for: by their age it would come after all that wait here.
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
        return args | config.engine_args

    async def roll(self, prompt: Prompt, temperature: float | None = None) -> tuple[RolloutGroup, dict[str, int]]:
        """The group of one prompt, and small numbers for the driver.

        Raises TimeoutError after rollout.deadline_s: whoever waited for the engine is told which prompt it was.
        """
        generate = _Generate(self, prompt, self._config.rollout.temperature if temperature is None else temperature)
        try:
            async with asyncio.timeout(self._config.rollout.deadline_s) as limit:
                trajectories = await self._rollout(prompt, generate)
        except TimeoutError:
            if not limit.expired():  # the rollout function's own
                raise
            raise TimeoutError(
                f"engine {self._index}: prompt row {prompt.row + 1} (from 1) took longer than "
                f"rollout.deadline_s={self._config.rollout.deadline_s:g} s"
            ) from None
        if len(trajectories) != prompt.num_samples:
            raise UserError(
                f"rollout.function={self._config.rollout.function} gave {len(trajectories)} trajectories for row "
                f"{prompt.row + 1} (from 1); it must give prompt.num_samples={prompt.num_samples}"
            )
        group = RolloutGroup(prompt, tuple(trajectories))
        spanning = sum(t.oldest_version != t.newest_version for t in trajectories)
        return group, {"num_tokens": sum(t.num_loss_tokens for t in trajectories), "num_spanning": spanning}

    def join(self, prompt: Prompt, parts: Sequence[RolloutGroup]) -> tuple[RolloutGroup, bool]:
        """The group of a prompt whose parts several engines generated; and a word that it is there."""
        group = RolloutGroup(prompt, tuple(t for part in parts for t in part.trajectories))
        assert len(group.trajectories) == prompt.num_samples, (len(group.trajectories), prompt.num_samples)
        return group, True

    async def probe(self, prompt: Prompt) -> tuple[RolloutGroup, bool]:
        """A few tokens after the prompt, all sampled by the weights served now; and a word that they are there."""
        few = replace(prompt, num_samples=PROBE_SAMPLES)
        room = self.room_for(len(few.token_ids), prompt_length=len(few.token_ids))
        completions = await self.generate(
            few.token_ids, n=few.num_samples, seed=few.seed, temperature=self._config.rollout.temperature,
            max_tokens=min(PROBE_TOKENS, room), first=True)
        return RolloutGroup(few, tuple(one_turn(few, completion) for completion in completions)), True

    async def generate(
        self, token_ids: Sequence[int] | np.ndarray, *, n: int, seed: int, temperature: float, max_tokens: int,
        first: bool = False,
    ) -> list[Completion]:
        """`n` samples after `token_ids`; sample i is drawn with seed + i, whatever else runs beside it.

        `first`: before all that wait in the engine, where rollouts are asynchronous.
        """
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        config = self._config.rollout
        params = SamplingParams(
            n=n,
            seed=seed,
            temperature=temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            max_tokens=max_tokens,
            stop=list(config.stop) or None,
            stop_token_ids=self._stop_ids,
            ignore_eos=config.ignore_eos,
            logprobs=0,
            flat_logprobs=True,
            detokenize=bool(config.stop),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        if config.ignore_eos:
            params.stop_token_ids = []
        tokens = TokensPrompt(prompt_token_ids=[int(t) for t in token_ids])
        if config.kv_after_update == "keep":
            await self._serving.wait()  # whose version it will be of
            tokens["cache_salt"] = str(self._version)  # a prefix computed by older weights is never hit
        final = None
        with _vllm_alive():
            request_id = f"{self._index}-{next(self._request_ids)}"
            async for output in self._engine.generate(tokens, params, request_id, priority=-1 if first else 0):
                final = output
        assert final is not None and final.finished
        return [completion_of(output) for output in sorted(final.outputs, key=lambda output: output.index)]

    def room_for(self, num_tokens: int, *, prompt_length: int) -> int:
        """Response tokens that fit after `num_tokens`, of which `prompt_length` are the prompt's; all turns count."""
        used = max(0, num_tokens - prompt_length)
        return min(self._config.rollout.max_tokens - used, self._max_model_len - num_tokens)

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    # The weight update, in the order of its calls, with the names of vLLM's framework.

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._staged = self._config.weights.staging == "device"
        request = WeightTransferInitRequest(init_info=init_info)
        await self._answered(self._engine.init_weight_transfer_engine(request))

    async def set_staged(self, staged: bool) -> None:
        """What all members of a gloo wire have agreed on."""
        self._staged = staged

    async def start_weight_update(self) -> None:
        """Requests wait from here on, unless the update is staged."""
        if not self._staged:
            await self._answered(self._pause())
        await self._answered(self._engine.start_weight_update())

    async def update_weights(self, update_info: Any) -> None:
        await self._answered(self._receive(update_info))

    async def begin_weight_update(self, update_info: Any) -> None:
        """start_weight_update and update_weights in one."""
        if not self._staged:
            await self._answered(self._pause())
        await self._answered(_in_a_row(self._engine.start_weight_update(), self._receive(update_info)))

    async def finish_weight_update(self, version: int) -> str:
        """Serve `version` from now on. Gives the label that the engine core holds, for the attestation."""
        if self._staged:
            await self._answered(self._pause())
        await self._answered(self._engine.finish_weight_update(str(version)))
        self._version = version
        label = str(await self._answered(self._engine.get_weight_version()))  # later it would wait for a forward pass
        await self._answered(self._engine.resume_generation())
        self._serving.set()
        return label

    async def finish_staged_update(self, num_rounds: int, version: int) -> str:
        """As finish_weight_update, of an update that has come and is first made ready, in so many parts: between two of
        them running requests go on."""
        for _ in range(num_rounds if self._device == "cpu" else 0):  # a GPU loads in no time
            await self.update_weights({})
        return await self.finish_weight_update(version)

    async def _receive(self, update_info: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._engine.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def _pause(self) -> None:
        """Freeze running requests; with kv_after_update=recompute they prefill again, under the new weights."""
        self._serving.clear()
        clear = self._config.rollout.kv_after_update == "recompute"
        # pause_generation is this, 20 ms of sleep, and a cache of images, of which there are none here.
        await self._engine.engine_core.pause_scheduler_async(mode="keep", clear_cache=clear)

    async def _answered(self, call: Coroutine[Any, Any, T]) -> T:
        """What vLLM's own process answers; RuntimeError soon after that process has died.

        When it dies vLLM fails the requests, but not the other calls that wait: those it leaves waiting for ever.
        """
        answer = asyncio.ensure_future(call)
        try:
            while not answer.done() and not self._engine.errored:
                await asyncio.wait({answer}, timeout=LOOK_EVERY_S)
            with _vllm_alive():
                if not answer.done():
                    raise self._engine.dead_error
                return await answer
        finally:
            answer.cancel()

    async def close(self) -> None:
        """End vLLM's processes."""
        if self._engine is not None:
            # A single process on CPU has nothing to give back; asked to end, it takes itself apart for seconds.
            alone = self._device == "cpu" and self._config.rollout.tensor_parallel_size == 1
            self._engine.shutdown(timeout=0.0 if alone else None)
            self._engine = None


async def _in_a_row(*calls: Coroutine[Any, Any, Any]) -> None:
    """Sent in this order, and none waits for the answer to one before: they wait for one forward pass together."""
    await asyncio.gather(*calls)


@contextmanager
def _vllm_alive() -> Iterator[None]:
    """RuntimeError in a few words where vLLM's own process is dead: its text points at a stack trace in the log."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError:
        raise RuntimeError("the process in which vLLM computes died") from None


class _Generate:
    """`generate` of one prompt: what a rollout function is given (see rollout.functions.Generate)."""

    def __init__(self, engine: RolloutEngine, prompt: Prompt, temperature: float) -> None:
        self._engine = engine
        self._prompt = prompt
        self._temperature = temperature
        self._turns: Counter[int] = Counter()
        self.tokenizer = engine.tokenizer

    async def __call__(
        self, token_ids: Sequence[int] | np.ndarray, *, n: int = 1, sample: int = 0, max_tokens: int | None = None
    ) -> list[Completion]:
        turn = max(self._turns[i] for i in range(sample, sample + n))  # vLLM draws the i-th of n with seed + i
        self._turns.update({i: turn + 1 - self._turns[i] for i in range(sample, sample + n)})
        seed = self._prompt.seed + sample + turn * TURN_SEED_STRIDE
        room = self._engine.room_for(len(token_ids), prompt_length=len(self._prompt.token_ids))
        room = room if max_tokens is None else min(room, max_tokens)
        if room < 1:  # the response is full: an empty, truncated turn
            empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32), FINISH_LENGTH)
            return [empty] * n
        return await self._engine.generate(token_ids, n=n, seed=seed, temperature=self._temperature, max_tokens=room)


def completion_of(output: Any) -> Completion:
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
    return Completion(token_ids, logprobs, versions, reason)
