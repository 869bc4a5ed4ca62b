"""How soon new weights are served, and how long running requests wait for them: 240 MB, two engines.

Takes:  a Session.
Gives:  `publish`: a latency and a stall for each weights.staging that there is, and what an engine alone would need;
        the parts `run` and `bare`.
Knows:  an engine serves a version when a running request has its first token of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import inside
from benchmarks.figures import Measured
from benchmarks.session import Session
from benchmarks.work import PROMPT_TOKENS, Phase, options
from flux_ray.config import WeightsConfig

#: Of a step: each engine has one prompt, and generates the next step's when an update comes.
PROMPTS, SAMPLES, TOKENS, STALENESS = 2, 2, 96, 1
WARM_UP, FEWEST, QUICK = 2, 5, 3  # steps
AFTER_UPDATE = ("recompute", "keep")  # of rollout.kv_after_update: what runs prefills again, or goes on with its KV


def publish(session: Session) -> list[Measured]:
    results, lengths = [], []
    for staging in stagings()[-1 if session.quick else 0:]:
        for kv in AFTER_UPDATE[: 1 if session.quick else None]:
            asked: dict[str, Any] = {"weights.staging": staging, "rollout.kv_after_update": kv}
            steps = WARM_UP + (QUICK if session.quick else max(FEWEST, 2 * session.runs))
            gave = session.part("publish", steps=steps, **asked)
            lengths += gave["lengths"]
            about = {"staging": staging, "kv_after_update": kv, "megabytes": 240, "engines": 2, "dtype": "float32"}
            ending = f"_{staging}" + "_keep" * (kv == "keep")
            results.append(Measured.of(f"publish{ending}", gave["served_s"], unit="s", goal="<= 1.0", **about))
            results.append(Measured.of(f"publish_stall{ending}", gave["stalled_s"], unit="s", goal="<= 0.4",
                                       longest=max(gave["stalled_s"]), **about))
    if not session.quick:
        tokens = round(statistics.median(lengths))
        alone = session.part("bare_update", tokens=tokens, rounds=max(FEWEST, session.runs))
        parts = {name: round(statistics.median(seconds), 3) for name, seconds in alone.items()}
        together = [sum(seconds) for seconds in zip(*alone.values(), strict=True)]
        results += [Measured.of("publish_bare", together, unit="s", **parts),
                    Measured.of("publish_stall_bare", alone["prefill_s"], unit="s", sequences=SAMPLES, tokens=tokens)]
    return results


def stagings() -> list[str]:
    """What weights.staging offers on CPU; auto is one of them."""
    (found,) = [f.metadata["choices"] for f in dataclasses.fields(WeightsConfig) if f.name == "staging"]
    return [name for name in found if name not in ("auto", "device")]


def run(folder: Path, work: Path, *, steps: int, **more: Any) -> dict[str, list[float]]:
    """For each version after the warm-up: seconds from the optimizer step until all engines serve it, and the longest
    that a running request waited between its last token of the old version and its first of the new; for each step
    what the trainer says that publishing took."""
    from flux_ray.config import from_dict
    from flux_ray.run import run as train

    rows = [{"prompt": str(10 ** (PROMPT_TOKENS - 1) + i), "lengths": [TOKENS] * SAMPLES}
            for i in range(PROMPTS * (steps + 4))]
    (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.environ[inside.WATCHED] = "1"
    phase = Phase("publish", [TOKENS] * PROMPTS * SAMPLES, 0, steps)
    history = train(from_dict(options(folder, dtype="float32", phases=[phase]) | {
        "model.path": str(folder / "60M"), "data.train": str(work / "data.jsonl"), "run_dir": str(work / "run"),
        "plugins": [inside.__file__], "rollout.num_engines": 2, "rollout.group_size": SAMPLES,
        "batch.prompts_per_step": PROMPTS, "driver.max_staleness": STALENESS} | more)).history
    updated = [json.loads(line)["at_s"] for line in (work / "trainer-0.jsonl").read_text().splitlines()]
    engines = [[json.loads(line) for line in (work / f"engine-{i}.jsonl").read_text().splitlines()]
               for i in range(more.get("rollout.num_engines", 2))]
    served, stalled, lengths = [], [], []
    for version in range(WARM_UP, steps):
        firsts = [first_token_s(requests, version) for requests in engines]
        if all(first is not None for first in firsts):
            served.append(max(firsts) - updated[version - 1])  # type: ignore[type-var, operator]
        lengths += [PROMPT_TOKENS + request["versions"].index(version) for request in itertools.chain(*engines)
                    if request["versions"][0] < version in request["versions"]]
        stalled += [max(waited) for waited in [waits_s(itertools.chain(*engines), version)] if waited]
    if not served or not stalled:
        raise RuntimeError("no request ran while an update came: the trainer was slower than the engines")
    return {"served_s": served, "stalled_s": stalled, "lengths": lengths,
            "publish_s": [step["weights/publish_s"] for step in history[WARM_UP:]]}


def bare(folder: Path, work: Path, *, tokens: int, rounds: int) -> dict[str, list[float]]:
    """What an engine alone needs, on one core and with nothing beside it: seconds to copy the weights once, to load
    them by vLLM's own reload, and until as many sequences as ran, of so many tokens, have their next one."""
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # as our engines
    import torch
    from safetensors.torch import load_file
    from vllm import LLM, SamplingParams
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    llm = LLM(model=str(folder / "60M"), dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**28,
              max_model_len=2 * (PROMPT_TOKENS + TOKENS), disable_log_stats=True, distributed_executor_backend="uni",
              enable_prefix_caching=False, enable_chunked_prefill=False, max_num_batched_tokens=8192)
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model, weights = worker.model_runner.model, load_file(folder / "60M" / "model.safetensors")
    place = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    asked = SamplingParams(max_tokens=1, ignore_eos=True, logprobs=0, detokenize=False)
    prompts = [{"prompt_token_ids": [4 + (i + k) % 10 for i in range(tokens)]} for k in range(SAMPLES)]

    def copy() -> None:
        for name, tensor in weights.items():
            place[name].copy_(tensor)

    def load() -> None:
        with set_current_vllm_config(worker.vllm_config), torch.no_grad():
            initialize_layerwise_reload(model)
            model.load_weights(place.items())
            finalize_layerwise_reload(model, worker.model_config)

    def seconds(do: Callable[[], Any]) -> float:
        start_s = time.perf_counter()
        do()
        return time.perf_counter() - start_s

    each = {"copy_s": copy, "load_s": load, "prefill_s": lambda: llm.generate(prompts, asked, use_tqdm=False)}
    measured = [{name: seconds(do) for name, do in each.items()} for _ in range(WARM_UP + rounds)][WARM_UP:]
    return {name: [of[name] for of in measured] for name in each}


def first_token_s(requests: Any, version: int) -> float | None:
    """When a request that ran before had its first token of this version; None where none ran: an engine without one
    waits for the driver's next prompt and not for weights."""
    times = [at_s for request in requests if request["versions"][0] < version
             for at_s, v in zip(request["times_s"], request["versions"], strict=True) if v == version]
    return min(times, default=None)


def waits_s(requests: Any, version: int) -> list[float]:
    """Of each request that went on under this version: from its last token of the one before to the next."""
    waits = []
    for request in requests:
        tokens = zip(request["times_s"], request["versions"], strict=True)
        waits += [b_s - a_s for (a_s, a), (b_s, b) in itertools.pairwise(tokens) if a != b == version]
    return waits
