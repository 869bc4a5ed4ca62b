"""Extra memory of the log-prob and entropy path, forward and backward, as a share of what it may take.

Takes:  nothing; run it: python -m benchmarks.bench_logprob_memory
Gives:  a line per shape: the peak beyond weights, their gradients and the hidden states themselves, and its ratio to
        1.2 x hidden states + 3 fp32 chunks of logits (below 1 is within the bound).
Knows:  the allocator's own events (torch's profiler), so nothing is sampled and nothing depends on the machine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from flux_ray.model.head import put_in_place

MIB = 2**20


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocabulary: int
    chunk: int
    dtype: torch.dtype = torch.float32

    @property
    def bound_bytes(self) -> float:
        return 1.2 * self.tokens * self.hidden * self.dtype.itemsize + 3 * self.chunk * self.vocabulary * 4


SHAPES = (
    Shape(tokens=2048, hidden=256, vocabulary=16384, chunk=256),
    Shape(tokens=8192, hidden=1024, vocabulary=2048, chunk=128),
    Shape(tokens=2048, hidden=256, vocabulary=16384, chunk=256, dtype=torch.bfloat16),
)


def memory_trace(profiler: profile) -> list[int]:
    """Bytes alive after each event of the allocator, from 0."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def peak_extra_bytes(shape: Shape) -> int:
    """Most bytes alive at once beyond what was there before; in backward, less the weight's gradient."""
    head = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False, dtype=shape.dtype)
    put_in_place(head, logit_scale=1.0, chunk_tokens=shape.chunk)
    hidden = torch.randn(shape.tokens, shape.hidden).to(shape.dtype).requires_grad_()
    rows = torch.arange(shape.tokens - 1)
    targets = torch.randint(shape.vocabulary, (shape.tokens - 1,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
        logprobs, entropy = head(hidden, rows, targets, 0.7, True)
        loss = logprobs.sum() + entropy.sum()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
        loss.backward()
    first, second = memory_trace(forward), memory_trace(backward)
    assert second[-1] > head.weight.nbytes, "the gradients are alive at the end"
    return max(max(first), first[-1] + max(second) - head.weight.nbytes)


def main() -> None:
    for shape in SHAPES:
        extra = peak_extra_bytes(shape)
        whole = shape.tokens * shape.vocabulary * 4
        print(f"{shape.tokens} tokens x {shape.hidden}, vocabulary {shape.vocabulary}, chunk {shape.chunk}, "
              f"{shape.dtype}: extra peak {extra / MIB:.1f} MiB = {extra / shape.bound_bytes:.2f} of the bound "
              f"(whole fp32 logits alone: {whole / MIB:.0f} MiB)")


if __name__ == "__main__":
    main()
