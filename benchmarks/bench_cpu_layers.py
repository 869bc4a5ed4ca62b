"""What attention in blocks and RMSNorm in blocks save a training rank on a CPU, against torch's and transformers' own.

    python -m benchmarks.bench_cpu_layers [--processes 2]

Forward and backward of a micro-batch of some 4,352 tokens, 8 heads of 64, ours and theirs by turns; one JSON line each:
medians in ms, ours as a share of theirs. With two processes each does all of it beside the other, as two ranks do.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from flux_ray.model.attention import causal_blocks
from flux_ray.model.norm import put_in_place

TOKENS, HEADS, HEAD_DIM = 4352, 8, 64
LENGTHS = (80, 272, 512, 1024)
ROUNDS = 9
MODULE: Any = SimpleNamespace(is_causal=True)


def attention_by_torch(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)


def attention_by_us(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal_blocks(MODULE, query, key, value, None)[0]


def milliseconds(kinds: dict[str, Callable[..., Tensor]], inputs: list[Tensor]) -> dict[str, float]:
    """Medians of forward and backward, each kind once in every round; the first round is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(1 + ROUNDS):
        for name, kind in kinds.items():
            start = time.perf_counter()
            output = kind(*inputs)
            torch.autograd.grad(output, inputs, torch.ones_like(output))
            taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(of[1:]) for name, of in taken.items()}


def measure(process: int) -> None:
    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            shape = (TOKENS // length, length, HEADS, HEAD_DIM)
            inputs = [torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
            tell("attention", milliseconds({"theirs": attention_by_torch, "ours": attention_by_us}, inputs),
                 dtype=dtype, tokens=length, process=process)
        theirs, ours = (nn.Sequential(Qwen3RMSNorm(HEADS * HEAD_DIM)).to(dtype) for _ in range(2))
        assert put_in_place(ours) == 1
        hidden = torch.randn(TOKENS, HEADS * HEAD_DIM).to(dtype).requires_grad_()
        tell("norm", milliseconds({"theirs": theirs, "ours": ours}, [hidden]), dtype=dtype, process=process)


def tell(name: str, medians: dict[str, float], **about: Any) -> None:
    rounded = {f"{kind}_ms": round(value, 2) for kind, value in medians.items()}
    share = round(medians["ours"] / medians["theirs"], 2)
    print(json.dumps({"name": name, **{k: str(v) for k, v in about.items()}, **rounded, "share": share}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    beside = [multiprocessing.get_context("spawn").Process(target=measure, args=(i,), daemon=True)
              for i in range(parser.parse_args().processes)]
    for process in beside:
        process.start()
    for process in beside:
        process.join(600)
        if process.exitcode != 0:
            process.kill()
            raise SystemExit("a process failed, or took longer than 600 s")


if __name__ == "__main__":
    main()
