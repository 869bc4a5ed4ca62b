"""How much faster `grpo_vectorized` is than the per-group form.

Prints one JSON line: seconds of each (median) and their ratio. Run: python -m benchmarks.bench_estimators [N L G]
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch

from flux_ray.algo import get_adv_estimator

NUM_REPEATS = 15


def median_s(function, *args, **kw) -> float:
    seconds = []
    for _ in range(NUM_REPEATS):
        start = time.perf_counter()
        function(*args, **kw)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main(num_rows: int = 4096, length: int = 512, group_size: int = 8) -> None:
    torch.manual_seed(0)
    lengths = torch.randint(1, length + 1, (num_rows, 1))
    mask = torch.arange(length) < lengths
    rewards = torch.zeros(num_rows, length).scatter(1, lengths - 1, torch.randn(num_rows, 1))
    index = torch.arange(num_rows) // group_size
    per_group, vectorized = get_adv_estimator("grpo"), get_adv_estimator("grpo_vectorized")
    same = torch.allclose(per_group(rewards, mask, index=index)[0],
                          vectorized(rewards, mask, group_size=group_size, index=index)[0], rtol=1e-6, atol=0)
    loop_s = median_s(per_group, rewards, mask, index=index)
    fast_s = median_s(vectorized, rewards, mask, group_size=group_size, index=index)
    print(json.dumps({"rows": num_rows, "length": length, "group_size": group_size, "threads": torch.get_num_threads(),
                      "same_numbers": same, "per_group_s": loop_s, "vectorized_s": fast_s, "ratio": loop_s / fast_s}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
