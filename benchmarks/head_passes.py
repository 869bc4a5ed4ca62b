"""Log-probs and entropy of a vocabulary, forward and backward: ours, whole logits, a fused kernel, and the floor.

Takes:  tokens, hidden size and vocabulary; a device.
Gives:  `measure`: milliseconds and memory of each way.
Knows:  the floor is the three products that nobody can do without; liger-kernel is measured where it is installed.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from flux_ray.model import head

HeadPass = Callable[[Tensor, Tensor, Tensor], None]  # hidden states, weight, targets
CHUNK = 1024
GIB = 2**30
ROUNDS, WARM_UP = 5, 2


def whole_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """As it is first written: all logits in fp32, their log-softmax, its entropy without gradients."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    with torch.no_grad():
        torch.stack([-(rows.exp() * rows).sum(-1).mean() for rows in log_p.split(CHUNK)])
    log_p.gather(1, targets[:, None]).sum().backward()


def products_alone(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The three products, in chunks: the floor."""
    gradient = torch.zeros_like(weight)
    for rows in hidden.detach().split(CHUNK):
        logits = rows @ weight.detach().t()
        logits @ weight.detach()
        gradient.addmm_(logits.t(), rows)


def ours(*, compiled: bool = True, trains_entropy: bool = False) -> HeadPass:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
        rows = torch.arange(len(hidden), device=hidden.device)
        with contextlib.nullcontext() if compiled else _plain_passes():
            logprobs, entropy = head._ChunkedLogprobs.apply(hidden, weight, None, rows, targets,
                                                            head.Chunking(1.0, None, CHUNK, True))
            (logprobs.sum() + (0.01 * entropy.sum() if trains_entropy else 0.0)).backward()

    return run


@contextlib.contextmanager
def _plain_passes() -> Iterator[None]:
    """Without the compiler."""
    passes = head._passes
    head._passes = lambda chunk: (head.measure, head.differentiate)
    try:
        yield
    finally:
        head._passes = passes


def fused_library() -> HeadPass | None:
    """liger-kernel's cross-entropy of a linear layer: log-probs alone, no entropy. None where it isn't installed."""
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return None
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, targets: loss(weight, hidden, targets).backward()


def ways(device: str) -> dict[str, HeadPass]:
    """By name, the floor first. What is compiled, and liger's kernel, are for GPUs."""
    found: dict[str, HeadPass | None] = {"products_alone": products_alone, "ours": ours(), "whole_logits": whole_logits}
    if device != "cpu":
        found |= {"ours_entropy_trained": ours(trains_entropy=True), "ours_eager": ours(compiled=False),
                  "liger_no_entropy": fused_library()}
    return {name: way for name, way in found.items() if way is not None}


def measure(num_tokens: int, *, hidden: int, vocab: int, dtype: torch.dtype, device: str) -> dict[str, dict[str, Any]]:
    """Way ► ms, its ratio to the floor, GiB beyond the inputs (GPUs); or the error, where memory didn't suffice."""
    generator = torch.Generator(device).manual_seed(0)
    states, weight = (torch.randn(n, hidden, device=device, generator=generator).to(dtype).requires_grad_()
                      for n in (num_tokens, vocab))
    weight.data.mul_(0.02)
    targets = torch.randint(vocab, (num_tokens,), device=device, generator=generator)
    figures: dict[str, dict[str, Any]] = {}
    for name, way in ways(device).items():
        def step(way: HeadPass = way) -> None:
            states.grad = weight.grad = None
            way(states, weight, targets)

        try:
            figures[name] = {"ms": 1e3 * median_s(step, device)}
            states.grad = weight.grad = None
            figures[name] |= _peak(step, device)
        except torch.OutOfMemoryError:
            figures[name] = {"error": "out of memory"}
            continue
        finally:
            states.grad = weight.grad = None
        figures[name]["of_floor"] = figures[name]["ms"] / figures["products_alone"]["ms"]
    return figures


def _peak(step: Callable[[], Any], device: str) -> dict[str, float]:
    if device == "cpu":
        return {}
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return {"extra_gib": (torch.cuda.max_memory_allocated() - before) / GIB}


def median_s(step: Callable[[], Any], device: str, *, rounds: int = ROUNDS) -> float:
    """Median seconds after a warm-up, each round waited for."""
    taken = []
    for _ in range(WARM_UP + rounds):
        wait(device)
        start_s = time.perf_counter()
        step()
        wait(device)
        taken.append(time.perf_counter() - start_s)
    return statistics.median(taken[WARM_UP:])


def wait(device: str) -> None:
    """Until the GPU has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()
