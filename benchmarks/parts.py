"""What is measured, each in a process of its own: nothing of one is in another's memory or threads.

Takes:  the name of a part, a folder with the models, its options.
Gives:  `run_part`: what the part gave. PARTS: `vllm` and `deepspeed` (bare), `ours`, and those of the other modules.
Never:  waits without a deadline, or leaves a process behind: they carry a mark in their environment, or are of the
        part's session (vLLM's write their name over the mark).
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import inside
from benchmarks.side_by_side import DEADLINE_S, Beside
from benchmarks.work import (
    CONTEXT,
    GROUP_SIZE,
    PROMPT_TOKENS,
    VOCAB,
    Phase,
    kv_gib,
    make_data,
    micro_batches,
    model_of,
    options,
)
from flux_ray import lifetime

REPO = Path(__file__).parents[1]
MARK = "FLUX_RAY_BENCH_PART"
#: As ours have it. That vLLM computes where its engine core is saves the floor a process that spins on the other core.
ENV = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
       "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
       "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(REPO)}
#: Name ► module:function. The function takes the folder and the part's options; what it gives is plain values.
PARTS = {
    "vllm": "parts:bare_vllm", "deepspeed": "parts:bare_deepspeed", "ours": "parts:ours",
    "trl": "peer:trl_steps", "same_loss": "peer:same_loss", "publish": "publish:run", "bare_update": "publish:bare",
    "driver": "driver_cost:run", "bare_calls": "driver_cost:bare_calls",
    **{f"gpu_{name}": f"gpu_parts:{name}" for name in ("machine", "model", "loop", "publish", "train", "head")},
}


def run_part(name: str, folder: Path, *, deadline_s: float, env: dict[str, str] | None = None,
             work: Path | None = None, **asked: Any) -> Any:
    """What the part gave. RuntimeError: it failed, or took longer than its deadline; its processes are gone then.

    `work`: the part's own folder, where the caller wants to look at it; its output is in output.txt there.
    """
    mark = secrets.token_hex(8)
    work = work or Path(tempfile.mkdtemp(prefix=f"{name}-", dir=folder))
    (work / "asked.json").write_text(json.dumps(asked))
    environment = {**os.environ, **ENV, **(env or {}), MARK: mark, inside.NOTES: str(work)}
    command = [sys.executable, "-m", "benchmarks.parts", name, str(folder), str(work)]
    with (work / "output.txt").open("w") as output:
        process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=output, stderr=output,
                                   start_new_session=True)
        try:
            code = process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{name} took longer than {deadline_s:g} s") from None
        finally:
            _end(mark, session=process.pid)
            process.wait()
    if code:
        lines = (work / "output.txt").read_text(errors="replace").strip().splitlines() or ["nothing said"]
        raise RuntimeError(f"{name} ended with {code}: {lines[-1]}")
    return json.loads((work / "gave.json").read_text())


def _end(mark: str, *, session: int) -> None:
    """Every process of the part that is left."""
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session or process.environ().get(MARK) == mark:
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            continue


def ours(folder: Path, work: Path, *, phases: list[dict[str, Any]], dtype: str, cores: dict[str, list[int]],
         **more: Any) -> dict[str, Any]:
    """A run of ours over the phases: each step's metrics by phase, and what the training ranks noted."""
    from flux_ray.config import from_dict
    from flux_ray.run import run

    os.environ[inside.CORES] = json.dumps(cores)
    measured = [Phase(**phase) for phase in phases]
    # In its last steps an asynchronous run generates less and less: they are not measured.
    planned = [*measured, Phase("last", measured[-1].lengths, warm_up=more.get("driver.max_staleness", 0), runs=0)]
    make_data(work / "data.jsonl", planned)
    result = run(from_dict(options(folder, dtype=dtype, phases=planned) | {
        "data.train": str(work / "data.jsonl"), "run_dir": str(work / "run"), "plugins": [inside.__file__]}
        | more))
    ranks = [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(work.glob("trainer-*"))]
    given, at = {}, 0
    for phase in measured:
        steps = slice(at + phase.warm_up, at + phase.steps)
        given[phase.name] = {"steps": result.history[steps], "ranks": [notes[steps] for notes in ranks]}
        at += phase.steps
    return given


def bare_vllm(folder: Path, work: Path, *, phases: list[dict[str, Any]], dtype: str,
              enforce_eager: bool = True, beside: dict[str, Any] | None = None) -> dict[str, list[float]]:
    """Seconds of each step's sequences from one engine; nothing else runs, or the part that `beside` names."""
    other = _beside(beside)
    return asyncio.run(_bare_vllm(folder, [Phase(**phase) for phase in phases], dtype, enforce_eager, other))


def _beside(asked: dict[str, Any] | None) -> Beside | None:
    other = Beside(**asked) if asked else None
    if other:
        other.stay_on_core()
    return other


async def _measured(step: Callable[[str, Phase], Awaitable[float]], phases: Sequence[Phase],
                    other: Beside | None) -> dict[str, list[float]]:
    """Seconds of each phase's steps after its warm-up; beside another part, then unmeasured ones until that is done."""
    seconds: dict[str, list[float]] = {}
    for phase in phases:
        for i in range(phase.warm_up):
            await step(f"{phase.name}-warm-{i}", phase)
        if other:
            other.meet(phase.name)
        seconds[phase.name] = [await step(f"{phase.name}-{i}", phase) for i in range(phase.runs)]
        if other:
            other.done(phase.name)
            await _go_on(step, phase, other)
    return seconds


async def _go_on(step: Callable[[str, Phase], Awaitable[float]], phase: Phase, other: Beside) -> None:
    """Unmeasured steps, until the other part is done with its own."""
    ends_s = time.monotonic() + DEADLINE_S
    while other.goes_on(phase.name):
        if time.monotonic() > ends_s:
            raise TimeoutError(f"{other.other} was not done within {DEADLINE_S:g} s")
        await step(f"{phase.name}-more-{time.monotonic()}", phase)


async def _bare_vllm(folder: Path, phases: Sequence[Phase], dtype: str, enforce_eager: bool,
                     other: Beside | None) -> dict[str, list[float]]:
    from flux_ray.rollout.cpu_startup.forking import fork_engine_core

    if enforce_eager:
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # as our engines
    fork_engine_core()
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    longest = max(max(phase.lengths) for phase in phases)
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=str(model_of(folder)), dtype=dtype, enforce_eager=enforce_eager,
        kv_cache_memory_bytes=int(kv_gib(phases) * 2**30),
        max_model_len=min(CONTEXT, PROMPT_TOKENS + longest), distributed_executor_backend="uni",
        disable_log_stats=True, enable_chunked_prefill=False, max_num_batched_tokens=8192))

    async def one(name: str, prompt: int, n: int, length: int) -> None:
        params = SamplingParams(n=n, seed=zlib.crc32(name.encode()), max_tokens=length, ignore_eos=True, logprobs=0,
                                detokenize=False, flat_logprobs=True, output_kind=RequestOutputKind.FINAL_ONLY)
        tokens = {"prompt_token_ids": [4 + prompt % 10] * PROMPT_TOKENS}
        async for _ in engine.generate(tokens, params, name):
            pass

    async def step(name: str, phase: Phase) -> float:
        start = time.perf_counter()
        requests = []
        for g, lengths in enumerate(phase.groups):
            alike = len(set(lengths)) == 1
            each = [(GROUP_SIZE, lengths[0])] if alike else [(1, length) for length in lengths]
            requests += [one(f"{name}-{g}-{i}", g, n, length) for i, (n, length) in enumerate(each)]
        await asyncio.gather(*requests)
        return time.perf_counter() - start

    seconds = await _measured(step, phases, other)
    engine.shutdown(timeout=0.0)
    return seconds


def bare_deepspeed(folder: Path, work: Path, *, phases: list[dict[str, Any]], dtype: str,
                   our_layers: bool = False, beside: dict[str, Any] | None = None) -> dict[str, list[float]]:
    """Seconds of forward, backward and AdamW on as many tokens: the model's own logits and cross-entropy.

    `our_layers`: attention and norms in blocks as our ranks have them, not the model as transformers makes it.
    """
    other = _beside(beside)
    import torch
    from transformers import AutoModelForCausalLM

    from flux_ray.config import from_dict
    from flux_ray.model import attention, norm
    from flux_ray.train import setup
    from tests.train.ranks import free_port

    config = from_dict({"model.path": str(model_of(folder)), "model.dtype": dtype}).train
    deepspeed = setup.join(config, rank=0, world_size=1, master_address="127.0.0.1", master_port=free_port(),
                           device="cpu")
    kind = getattr(torch, dtype)
    hf = AutoModelForCausalLM.from_pretrained(model_of(folder), dtype=kind)
    if our_layers:
        hf.set_attn_implementation(attention.CAUSAL_BLOCKS)
        norm.put_in_place(hf)
    engine, *_ = deepspeed.initialize(model=hf, optimizer=torch.optim.AdamW(hf.parameters(), lr=1e-6, fused=True),
                                      config=setup.deepspeed_config(config, kind))

    async def step(name: str, phase: Phase) -> float:
        start = time.perf_counter()
        plan = micro_batches(phase.lengths)
        for k, rows in enumerate(plan):
            ids = torch.randint(3, VOCAB, (len(rows), rows[0]))
            logits = engine(input_ids=ids).logits[:, PROMPT_TOKENS - 1 : -1]
            inside_BL = torch.arange(PROMPT_TOKENS, rows[0]) < torch.tensor(rows)[:, None]
            wanted = ids[:, PROMPT_TOKENS:][inside_BL]
            loss = torch.nn.functional.cross_entropy(logits[inside_BL].float(), wanted, reduction="sum")
            engine.set_gradient_accumulation_boundary(k == len(plan) - 1)
            engine.backward(loss / sum(phase.lengths))
        engine.step()
        return time.perf_counter() - start

    return asyncio.run(_measured(step, [Phase(**phase) for phase in phases], other))


def main() -> None:
    lifetime.end_with_parent()
    name, folder, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    module, _, function = PARTS[name].partition(":")
    part = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    gave = part(folder, work, **json.loads((work / "asked.json").read_text()))
    (work / "gave.json").write_text(json.dumps(gave))
    os._exit(0)  # else Python takes a second or two to take apart what was imported; `run_part` ends what is left


if __name__ == "__main__":
    main()
