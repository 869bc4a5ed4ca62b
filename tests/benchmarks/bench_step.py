"""A whole synchronous step against the sum of its bare parts, on the same machine in the same run.

python -m tests.benchmarks.bench_step [--dtype float32|bfloat16] [--steps N]

Bare vLLM: the same 64 sequences of 256 tokens from one engine, nothing else running. Bare DeepSpeed: forward, backward
and AdamW on as many tokens, the model's own logits and cross-entropy. Ours: `driver/step_s` of a run with one engine,
one rank. One thread each. Prints a JSON line a figure; medians after a warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_PROMPTS, GROUP_SIZE, PROMPT_TOKENS, RESPONSE_TOKENS = 8, 8, 16, 256
KV_BYTES = 2**30
VOCAB, MICRO_BATCH_TOKENS = 4096, 4608  # 16 sequences a micro-batch, with us and bare


def make_model(folder: Path) -> None:
    """30M parameters in Qwen3's architecture, random weights, a tokenizer of single characters."""
    import torch
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    from tests.tiny import EOS_ID, PAD_ID, tiny_tokenizer

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCAB, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                         num_attention_heads=8, num_key_value_heads=8, head_dim=64, max_position_embeddings=512,
                         tie_word_embeddings=True, eos_token_id=EOS_ID, pad_token_id=PAD_ID, bos_token_id=None)
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    rows = [{"prompt": str(10**(PROMPT_TOKENS - 1) + i), "answer": "1"} for i in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(json.dumps({"name": "parameters", "value": model.num_parameters()}), flush=True)


def ours(folder: Path, dtype: str, steps: int) -> list[float]:
    from flux_ray.config import from_dict
    from flux_ray.driver import run

    result = run(from_dict({
        "model.path": str(folder / "model"), "model.dtype": dtype, "data.train": str(folder / "data.jsonl"),
        "run_dir": str(folder / "run"), "reward.functions": ["length"], "reward.options": {"length": {"target": 10}},
        "algo.beta": 0.0, "algo.entropy_coef": 0.0, "batch.prompts_per_step": NUM_PROMPTS,
        "rollout.group_size": GROUP_SIZE, "rollout.max_tokens": RESPONSE_TOKENS, "rollout.ignore_eos": True,
        "batch.max_tokens_per_micro_batch": MICRO_BATCH_TOKENS, "driver.num_steps": steps + 1,
        "observability.samples_per_step": 0, "rollout.kv_cache_gib": KV_BYTES / 2**30,
    }))
    for name in ("driver/wait_s", "train/step_s", "weights/publish_s"):
        value = statistics.median(step[name] for step in result.history[1:])
        print(json.dumps({"name": name, "value": round(value, 3), "unit": "s"}), flush=True)
    return [step["driver/step_s"] for step in result.history[1:]]


async def bare_vllm(folder: Path, dtype: str, steps: int) -> list[float]:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(
        model=str(folder / "model"), dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=KV_BYTES,
        distributed_executor_backend="uni", disable_log_stats=True, enable_chunked_prefill=False,
        max_num_batched_tokens=8192))

    async def one(i: int, seed: int) -> None:
        params = SamplingParams(n=GROUP_SIZE, seed=seed, max_tokens=RESPONSE_TOKENS, ignore_eos=True, logprobs=0,
                                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
        tokens = {"prompt_token_ids": [4 + i % 10] * PROMPT_TOKENS}
        async for _ in engine.generate(tokens, params, f"{seed}-{i}"):
            pass

    seconds = []
    for step in range(steps + 1):
        start = time.perf_counter()
        await asyncio.gather(*(one(i, 1000 * step + i) for i in range(NUM_PROMPTS)))
        seconds.append(time.perf_counter() - start)
    engine.shutdown()
    return seconds[1:]


def bare_deepspeed(folder: Path, dtype: str, steps: int) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    from flux_ray.config import from_dict
    from flux_ray.train import setup

    config = from_dict({"model.path": str(folder / "model"), "model.dtype": dtype})
    deepspeed = setup.join(config, rank=0, world_size=1, master_address="127.0.0.1", master_port=29871, device="cpu")
    kind = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=kind)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
                                      config=setup.deepspeed_config(config, kind))
    length = PROMPT_TOKENS + RESPONSE_TOKENS
    rows = MICRO_BATCH_TOKENS // length
    num_micro = NUM_PROMPTS * GROUP_SIZE // rows
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        for i in range(num_micro):
            ids = torch.randint(3, VOCAB, (rows, length))
            logits = engine(input_ids=ids).logits[:, PROMPT_TOKENS - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, PROMPT_TOKENS:].flatten())
            engine.set_gradient_accumulation_boundary(i == num_micro - 1)
            engine.backward(loss)
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


PARTS = {"vllm": lambda *a: asyncio.run(bare_vllm(*a)), "deepspeed": bare_deepspeed, "ours": ours}


def measured(part: str, folder: Path, dtype: str, steps: int) -> float:
    """The part in a process of its own: nothing of one is in another's memory or threads."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PART": part}
    if part == "vllm":
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    command = [sys.executable, "-m", "tests.benchmarks.bench_step", "--part", part, "--folder", str(folder),
               "--dtype", dtype, "--steps", str(steps)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=600, check=True)
    lines = [line for line in done.stdout.splitlines() if line[:1] in "[{" and not line.startswith("[ ")]
    for line in lines[:-1]:
        print(line, flush=True)
    return statistics.median(json.loads(lines[-1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--part", choices=sorted(PARTS))
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments.folder, arguments.dtype, arguments.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        seconds = {part: measured(part, Path(folder), arguments.dtype, arguments.steps) for part in PARTS}
    for part, value in seconds.items():
        print(json.dumps({"name": f"{part}_step", "value": round(value, 3), "unit": "s", "dtype": arguments.dtype}))
    ratio = seconds["ours"] / (seconds["vllm"] + seconds["deepspeed"])
    print(json.dumps({"name": "sync_ratio", "value": round(ratio, 3), "unit": "x", "goal": "<= 1.5",
                      "runs": arguments.steps, "dtype": arguments.dtype}))


if __name__ == "__main__":
    main()
