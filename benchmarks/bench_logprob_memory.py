"""Extra memory of the log-prob and entropy path, forward and backward, as a share of what it may take.

Takes:  nothing; run it: python -m benchmarks.bench_logprob_memory
Gives:  a line per shape: the peak beyond weights, their gradients and the hidden states themselves, and its ratio to
        1.2 x hidden states + 3 fp32 chunks of logits (below 1 is within the bound).
"""

from __future__ import annotations

import torch

from tests.model.head_memory import Shape, peak_extra_bytes

MIB = 2**20
SHAPES = (
    Shape(tokens=2048, hidden=256, vocabulary=16384, chunk=256),
    Shape(tokens=8192, hidden=1024, vocabulary=2048, chunk=128),
    Shape(tokens=2048, hidden=256, vocabulary=16384, chunk=256, dtype=torch.bfloat16),
)


def main() -> None:
    for shape in SHAPES:
        extra = peak_extra_bytes(shape)
        whole = shape.tokens * shape.vocabulary * 4
        print(f"{shape.tokens} tokens x {shape.hidden}, vocabulary {shape.vocabulary}, chunk {shape.chunk}, "
              f"{shape.dtype}: extra peak {extra / MIB:.1f} MiB = {extra / shape.bound_bytes:.2f} of the bound "
              f"(whole fp32 logits alone: {whole / MIB:.0f} MiB)")


if __name__ == "__main__":
    main()
