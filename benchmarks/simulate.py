"""The scheduler in simulated time: random schedules, and step times predicted from measured costs.

python -m benchmarks.simulate --schedules 100000        # each is checked; one that fails is told by its seed
python -m benchmarks.simulate --costs costs.json        # predicted beside measured, for the runs in the file
python -m benchmarks.simulate --costs costs.json --docs # and for 8 to 1,000 engines, into docs/scaling.md

It runs the driver's own loop, ledger, stages and the rollout workers; engines, rewards, ranks and clock are simulated
(tests/fakes/simulated.py).
The costs are those of benchmarks.costs.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.costs import GROUP_SIZE, RUNS, TOKENS
from flux_ray.config import RolloutConfig
from tests.driver.schedules import RandomSchedule, check
from tests.fakes.simulated import Costs, SimulatedTime, World, simulate

DOCS = Path(__file__).parents[1] / "docs" / "scaling.md"
TABLE = re.compile(r"(?<=<!-- predicted -->\n).*?(?=<!-- end -->)", re.DOTALL)
ENGINES = (8, 32, 128, 1000)
PROMPTS_PER_ENGINE, MEAN_TOKENS, SIGMA = 8, 256, 0.8
PROMPT_TOKENS = 16
MAX_NUM_SEQS = RolloutConfig.max_num_seqs  # the default, as the measured runs have it
STEPS, WARM_UP = 9, 3  # of a prediction: asynchronous runs take some steps to settle
#: Columns of the table: options of a run.
SETTINGS: dict[str, dict[str, Any]] = {
    "equal lengths, synchronous": {"sigma": 0.0},
    "σ 0.8, synchronous": {},
    "σ 0.8, streaming": {"part_tokens": 4096},  # a micro-batch of each rank
    "σ 0.8, split_groups=4": {"split_groups": 4},
    "σ 0.8, max_staleness=1": {"max_staleness": 1},
}


def run_schedules(first: int, count: int) -> None:
    logging.disable(logging.WARNING)  # of engines that die: thousands
    counts: Counter[str] = Counter()
    clock, start_s = SimulatedTime(), time.process_time()
    for seed in range(first, first + count):
        world = check(RandomSchedule(seed), clock=clock)
        counts["steps"] += len(world.batches)
        counts["groups"] += sum(len(batch) for batch in world.batches)
        counts["stale"] += sum(oldest > 0 for oldest, _ in world.staleness)
        counts["spanning_versions"] += sum(oldest != newest for oldest, newest in world.staleness)
        counts["dropped"] += int(sum(m["filter/dropped_same_reward"] + m["filter/dropped_reward_failed"]
                                     for m in world.metrics))
        counts["surplus"] += int(sum(m["filter/surplus"] for m in world.metrics))
    print(json.dumps({"name": "schedules", "value": count, "failed": 0, **counts,
                      "cpu_s": round(time.process_time() - start_s)}))


def predicted_s(
    costs: Costs, length_of: Callable[[int, int], int], *, part_tokens: float = math.inf, **options: Any,
) -> float:
    """Mean seconds of a step, once the run has settled."""
    world = World(costs, length_of=length_of, prompt_tokens=PROMPT_TOKENS, num_rows=10**9)
    last = options.get("max_staleness", 0)  # steps in which generation runs out
    config = RandomSchedule.plain(num_steps=STEPS + last, **options)
    simulate(config, world, clock=SimulatedTime(), part_tokens=part_tokens)
    return (world.step_end_s[STEPS - 1] - world.step_end_s[WARM_UP - 1]) / (STEPS - WARM_UP)


def log_normal(sigma: float) -> Callable[[int, int], int]:
    """Lengths of mean MEAN_TOKENS, at most eight times that."""
    def length_of(uid: int, sample: int) -> int:
        drawn = random.Random(hash((uid, sample))).gauss(-sigma * sigma / 2, sigma)
        return max(1, min(8 * MEAN_TOKENS, round(MEAN_TOKENS * math.exp(drawn))))

    return length_of


def compare(measured: dict[str, Any]) -> list[str]:
    """Rows of a table: each run of the file, predicted and measured."""
    rows = []
    for name, (engines, prompts) in RUNS.items():
        run = measured["runs"][name]
        step_s = predicted_s(Costs(**measured["costs"]), lambda uid, i: TOKENS, num_engines=engines,
                             prompts_per_step=prompts, group_size=GROUP_SIZE, max_num_seqs=MAX_NUM_SEQS)
        error = step_s / run["driver/step_s"] - 1
        print(json.dumps({"name": name, "predicted": round(step_s, 3), "measured": round(run["driver/step_s"], 3),
                          "unit": "s", "error": round(error, 3)}), flush=True)
        rows.append(f"| {name} | {step_s:.2f} s | {run['driver/step_s']:.2f} s (quartiles {run['spread_s']:.2f} s "
                    f"apart) | {error:+.0%} |")
    return rows


def scale(costs: Costs) -> list[str]:
    """Rows of a table: seconds of a step by number of engines, as many training ranks and reward workers as engines."""
    rows = []
    for engines in ENGINES:
        cells = []
        for name, options in SETTINGS.items():
            given = {"sigma": SIGMA, "part_tokens": math.inf, **options}
            given["part_tokens"] *= engines
            seconds = predicted_s(costs, log_normal(given.pop("sigma")), num_engines=engines, num_ranks=engines,
                                  prompts_per_step=PROMPTS_PER_ENGINE * engines, group_size=GROUP_SIZE,
                                  max_num_seqs=MAX_NUM_SEQS, num_workers=engines, **given)
            cells.append(seconds)
            print(json.dumps({"name": f"{engines} engines, {name}", "predicted": round(seconds, 2), "unit": "s"}),
                  flush=True)
        driver_s = PROMPTS_PER_ENGINE * engines * costs.driver_s
        rows.append(f"| {engines:,} | " + " | ".join(f"{cell:.2f}" for cell in cells) + f" | {driver_s:.2f} |")
    return rows


def report(measured: dict[str, Any]) -> str:
    """The part of docs/scaling.md that is predicted."""
    costs = measured["costs"]
    checked, scaled = compare(measured), scale(Costs(**costs))
    tokens_per_s = {n: round(n / step_s) for n, step_s in measured["engine"]}
    given = ", ".join(f"{key} {value:.3g}" for key, value in costs.items())
    engine = ", ".join(f"{n}: {value:,}" for n, value in tokens_per_s.items())
    return "\n".join([
        f"Costs given, in seconds: {given}. An engine alone, tokens/s by running sequences: {engine}.", "",
        "| run on this kind of machine | predicted step | measured step | error |", "|---|---|---|---|", *checked, "",
        "The costs come from the engine alone and from the second row, the others are predicted.", "",
        f"Predicted step time in seconds, {PROMPTS_PER_ENGINE} prompts × {GROUP_SIZE} samples of {MEAN_TOKENS} tokens "
        "on average for each engine, as many training ranks and reward workers as engines:", "",
        "| engines | " + " | ".join(SETTINGS) + " | of which the driver |", "|---" * (len(SETTINGS) + 2) + "|", *scaled,
        ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=0, metavar="N")
    parser.add_argument("--first", type=int, default=0, help="seed of the first schedule")
    parser.add_argument("--costs", type=Path, help="a file of benchmarks.costs")
    parser.add_argument("--docs", action="store_true", help=f"predict for {ENGINES} engines and write {DOCS.name}")
    arguments = parser.parse_args()
    if arguments.schedules:
        run_schedules(arguments.first, arguments.schedules)
    if arguments.costs:
        measured = json.loads(arguments.costs.read_text())
        if arguments.docs:
            table = report(measured)
            DOCS.write_text(TABLE.sub(lambda _: table, DOCS.read_text()))
        else:
            compare(measured)


if __name__ == "__main__":
    main()
