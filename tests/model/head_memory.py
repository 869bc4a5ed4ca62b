"""How much memory the log-prob and entropy path takes beyond its inputs.

Gives:  `Shape`, with the bound; `peak_extra_bytes`: the peak beyond weights, their gradients and the hidden states.
Knows:  the allocator's own events (torch's profiler), so nothing is sampled and nothing depends on the machine.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

from flux_ray.model.head import put_in_place


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


def memory_trace(profiler: profile) -> list[int]:
    """Bytes alive after each event of the allocator, from 0."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def peak_extra_bytes(shape: Shape) -> int:
    """Most bytes alive at once beyond what was there before; in backward, less the weight's gradient."""
    head = torch.nn.Linear(shape.hidden, shape.vocabulary, bias=False, dtype=shape.dtype)
    put_in_place(head, chunk_tokens=shape.chunk)
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
