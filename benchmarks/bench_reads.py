"""What estimators and losses cost at 4,096 x 2,048, in reads of their inputs.

Takes:  rows and length, or nothing; run it: python -m benchmarks.bench_reads [N L]
Gives:  a line per estimator and loss (also with its gradient): bytes that its kernels read / bytes of its inputs, and
        the time it takes, in reads too (a read is a sum over every byte of the inputs).
Knows:  bytes don't depend on the machine (what fits into a core's cache is not counted), time does: fresh pages cost
        more than reading them; medians of repeated runs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_ray.algo.estimators import ESTIMATORS
from flux_ray.algo.losses import POLICY_LOSSES
from flux_ray.config import AlgoConfig

NUM_REPEATS = 5
GROUP_SIZE = 8
IN_CACHE_BYTES = 2**20
#: Kernels that read nothing: views, and `empty`.
VIEWS = ("view", "expand", "unsqueeze", "squeeze", "detach", "slice", "select", "alias", "t", "unbind", "split",
         "empty", "empty_like")


class BytesRead(TorchDispatchMode):
    """Bytes in memory of the tensors that each kernel is given; an expanded one counts once, a small one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket.__name__.rstrip("_") not in VIEWS:
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, torch.Tensor):
                    in_memory = value.untyped_storage().nbytes()
                    small = in_memory <= IN_CACHE_BYTES
                    self.total += 0 if small else min(value.numel() * value.element_size(), in_memory)
        return function(*args, **(kwargs or {}))


def measure(function: Callable[[], object], *inputs: torch.Tensor) -> tuple[float, float, float]:
    """(bytes read / bytes of the inputs, time / time of one read, seconds)."""
    with BytesRead() as counted:
        function()
    read = median_s(lambda: [tensor.view(torch.float32).sum() for tensor in inputs])
    seconds = median_s(function)
    return counted.total / sum(tensor.nbytes for tensor in inputs), seconds / read, seconds


def median_s(function: Callable[[], object]) -> float:
    seconds = []
    for _ in range(NUM_REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def show(what: str, measured: tuple[float, float, float]) -> None:
    count, timed, seconds = measured
    print(f"{what:<36} reads {count:5.2f}   time {seconds * 1e3:4.0f} ms = {timed:5.1f} reads")


def main(num_rows: int = 4096, length: int = 2048) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, length + 1, (num_rows, 1))
    mask = torch.arange(length) < lengths
    rewards = torch.zeros(num_rows, length).scatter(1, lengths - 1, torch.randn(num_rows, 1))
    index = torch.arange(num_rows) // GROUP_SIZE
    print(f"{num_rows} x {length}, {torch.get_num_threads()} threads")
    old, new = (torch.randn(2, num_rows, length) * 0.1 - 1).unbind()
    for name, estimator in ESTIMATORS.items():
        def estimate(f: Callable = estimator.function) -> object:
            return f(rewards, mask, index=index, group_size=GROUP_SIZE, values=old)

        show(f"estimator {name}", measure(estimate, rewards, mask, *([old] if estimator.needs_values else [])))

    advantages = torch.randn(num_rows, 1).expand(num_rows, length).contiguous()
    for name, loss in POLICY_LOSSES.items():
        def value(f: Callable = loss.function, log_prob: torch.Tensor = new) -> torch.Tensor:
            return f(old, log_prob, advantages, mask, config=AlgoConfig())[0]

        def with_gradient(value: Callable = value) -> None:
            value(log_prob=new.detach().requires_grad_()).sum().backward()

        show(f"loss {name}", measure(value, old, new, advantages, mask))
        show(f"loss {name} with gradient", measure(with_gradient, old, new, advantages, mask))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
