"""CPU time that an update of 29M parameters takes more for being compared: `python -m benchmarks.bench_attest`.

Takes:  the shapes of the model that every step is measured on (work.py); layers that are read back as vLLM's are.
Gives:  a line of JSON: seconds bare (packed, loaded) and with checksums and comparison, and the ratio of the two.
Knows:  no process, no wire: both ends in one thread, so that only the added work differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.work import SIZES, VOCAB
from flux_ray.weights.attest import Receipts
from flux_ray.weights.buckets import Param, buckets, size_of, unpack
from flux_ray.weights.checksum import Sums

BUCKET = 64 * 2**20  # bytes


class Linear(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.input_size_per_partition = width
        self.weight = nn.Parameter(torch.randn(rows, width), requires_grad=False)
        self.load(self.weight.data)

    def load(self, weight: torch.Tensor) -> None:
        self.weight.data.copy_(weight)
        self.cpu_linear = lambda x, weight, bias: nn.functional.linear(x, weight, bias)


def model(size: str) -> nn.ModuleDict:
    hidden, layers = SIZES[size]
    shapes = {"q": (hidden, hidden), "k": (hidden, hidden), "v": (hidden, hidden), "o": (hidden, hidden),
              "gate": (3 * hidden, hidden), "up": (3 * hidden, hidden), "down": (hidden, 3 * hidden)}
    made = {f"{name}{i}": Linear(*shape) for i in range(layers) for name, shape in shapes.items()}
    return nn.ModuleDict(made | {"embed": Linear(VOCAB, hidden)})


def update(of: nn.ModuleDict, weights: dict[str, torch.Tensor], receipts: Receipts | None) -> None:
    """Pack and load it; with receipts also compare."""
    params = [Param(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()]
    sums = Sums()
    given = iter(sums.watch(weights.items()) if receipts is not None else weights.items())
    if receipts is not None:
        receipts.begin()
        receipts.expect(params)
    for run in buckets(params, BUCKET):
        place = torch.empty(size_of(run), dtype=torch.uint8)
        there = unpack(place, run)
        for _, tensor in there:
            tensor.copy_(next(given)[1])
        if receipts is not None:
            receipts.take(there)
        for name, tensor in there:
            of[name.partition(".")[0]].load(tensor)  # type: ignore[operator]
    if receipts is not None:
        next(given, None)
        wrong = receipts.wrong(sums.given())
        assert not wrong, wrong


def cpu_s(do: Callable[[], None], times: int) -> float:
    do()
    spent = []
    for _ in range(times):
        start_s = time.process_time()
        do()
        spent.append(time.process_time() - start_s)
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--size", choices=SIZES, default="29M")
    parser.add_argument("--times", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    of = model(arguments.size)
    weights = {name: parameter.clone() for name, parameter in of.named_parameters()}
    receipts = Receipts(of)
    bare_s = cpu_s(lambda: update(of, weights, None), arguments.times)
    compared_s = cpu_s(lambda: update(of, weights, receipts), arguments.times)
    print(json.dumps({"megabytes": round(sum(w.nbytes for w in weights.values()) / 1e6), "bare_s": round(bare_s, 4),
                      "compared_s": round(compared_s, 4), "added_s": round(compared_s - bare_s, 4),
                      "ratio": round(compared_s / bare_s, 2)}))


if __name__ == "__main__":
    main()
