"""What writing rollouts costs beside a step: CPU seconds and bytes of a group, and the driver's memory.

`python -m benchmarks.rollouts_cost [--groups 64] [--samples 8] [--tokens 256]`: groups of random tokens are written as
a rollout worker writes them. It counts the CPU time of all threads, of a table and of its file.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
import tracemalloc

import numpy as np

from flux_ray.observability import rollouts
from flux_ray.observability.rollouts import TRAINED, KeptRollouts, Rollout
from flux_ray.records import Prompt, RolloutGroup, ScoredGroup, Trajectory

PROMPT_TOKENS, VOCABULARY, REPEATS, STEPS = 64, 50_000, 5, 10_000


def group(uid: int, *, samples: int, tokens: int, random: np.random.Generator) -> Rollout:
    length = PROMPT_TOKENS + tokens
    mask = np.arange(length) >= PROMPT_TOKENS

    def logprobs() -> np.ndarray:
        return np.where(mask, -random.exponential(size=length), 0).astype(np.float32)

    trajectories = tuple(Trajectory(random.integers(VOCABULARY, size=length, dtype=np.int32), mask, logprobs(),
                                    np.where(mask, uid, -1).astype(np.int32), PROMPT_TOKENS, "stop")
                         for _ in range(samples))
    rewards = random.normal(size=samples)
    counts = np.full(samples, length), np.full(samples, tokens), np.zeros(samples, bool)
    made = {name: [logprobs() for _ in trajectories] for name in (*rollouts.MADE, "entropies")}
    prompt = Prompt(uid, uid, "what is it? " * 20, trajectories[0].token_ids[:PROMPT_TOKENS], {}, samples, 0)
    return Rollout(RolloutGroup(prompt, trajectories), 0, ["so it is, " * (tokens // 3)] * samples,
                   ScoredGroup(uid, rewards, rewards, {"f": rewards}, *counts, uid), TRAINED, 0, [0] * samples,
                   1.0, 0.1, 0.1, 0, made)


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("groups", 64), ("samples", 8), ("tokens", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    random = np.random.default_rng(0)
    several = [group(uid, samples=asked.samples, tokens=asked.tokens, random=random) for uid in range(asked.groups)]
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = rollouts.write(folder, 0, several)  # imports what it needs
        begin_s, wall_s = cpu_s(), time.perf_counter()
        for step in range(REPEATS):
            rollouts.write(folder, step, several)
        used_s, wall_s = (cpu_s() - begin_s) / REPEATS, (time.perf_counter() - wall_s) / REPEATS
        begin_s = cpu_s()
        for _ in range(REPEATS):
            rollouts.table_of(several)
        table_s = (cpu_s() - begin_s) / REPEATS
        tracemalloc.start()
        kept = KeptRollouts(folder, max_gib=1e9)
        for step in range(STEPS):
            kept.written(step, num_bytes)
        driver = tracemalloc.get_traced_memory()[0]
    num_tokens = asked.groups * asked.samples * (PROMPT_TOKENS + asked.tokens)
    print(f"{asked.groups} groups of {asked.samples} x {PROMPT_TOKENS} + {asked.tokens} tokens: "
          f"{1e3 * used_s:.1f} ms of CPU a step ({1e3 * wall_s:.1f} ms elapsed), "
          f"{1e3 * used_s / asked.groups:.2f} ms a group, of which the table {1e3 * table_s / asked.groups:.2f} ms; "
          f"{num_bytes / num_tokens:.1f} bytes a token; the driver keeps {driver / STEPS:.0f} bytes a step")


if __name__ == "__main__":
    main()
