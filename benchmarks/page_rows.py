"""How fast the page's table is: `python -m benchmarks.page_rows FOLDER [--rows 100000]`.

Takes:  a folder for the made rollouts; how many rows, of 500 tokens each, 256 in a step's file.
Gives:  the seconds to open the table, to sort, filter and search it, and this process's memory.
Knows:  files that are there already are taken as they are.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from flux_ray.observability.page.runs import found_runs
from flux_ray.observability.page.table import Wanted, table_of
from tests.fakes.run_files import write_metrics, write_rollouts

GROUPS, GROUP_SIZE, NUM_TOKENS = 32, 8, 500
LOOKS = {
    "newest": Wanted(), "best reward": Wanted(sort="reward"),
    "one outcome": Wanted(outcome="same_reward"), "search": Wanted(search="carry one so"),
    "search again, sorted": Wanted(search="carry one so", sort="reward"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page_rows")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    steps = -(-arguments.rows // (GROUPS * GROUP_SIZE))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "metrics.jsonl").exists():
        write_metrics(folder, steps)
    for step in range(steps):
        if not (folder / "rollouts" / f"step={step:06d}").exists():
            write_rollouts(folder, step, groups=GROUPS, group_size=GROUP_SIZE, num_tokens=NUM_TOKENS)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (run,), _ = found_runs([folder])
    table = table_of(run)
    start = time.perf_counter()
    page = table.page(Wanted(), first=0, size=50)
    print(f"{'first look':<22} {time.perf_counter() - start:7.3f} s   {page['total']:>8} rows are known", flush=True)
    while page["unread"]:
        page = table.page(Wanted(), first=0, size=50)
    print(f"{'all is known':<22} {time.perf_counter() - start:7.3f} s", flush=True)
    for name, wanted in LOOKS.items():
        start = time.perf_counter()
        page = table.page(wanted, first=0, size=50)
        seconds = time.perf_counter() - start
        print(f"{name:<22} {seconds:7.3f} s   {page['total']:>8} of {page['known']} rows", flush=True)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"memory: {before / 1024:.0f} MiB before, {most / 1024:.0f} MiB at most")


if __name__ == "__main__":
    main()
