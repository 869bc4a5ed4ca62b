"""One rank of scenarios: `python -m tests.train.rank_process WORLD_SIZE PORT FOLDER RANK SCENARIO...`.

Takes:  a folder with the models that the scenarios train.
Gives:  SCENARIO.json of each in the folder, and its safetensors, from rank 0.
Knows:  starting a process costs more than a scenario: all of a world size are done in one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from tests.train import critic_scenarios, mixture_scenarios, pair_scenarios, scenarios, skip_scenarios

SCENARIOS = {**scenarios.SCENARIOS, **critic_scenarios.SCENARIOS, **pair_scenarios.SCENARIOS,
             **skip_scenarios.SCENARIOS, **mixture_scenarios.SCENARIOS}


def main() -> None:
    world_size, port, folder, number, *names = sys.argv[1:]
    rank = scenarios.Rank(int(world_size), int(port), Path(folder), int(number))
    for name in names:
        gc.freeze()  # as in a run: DeepSpeed collects often, and would look at all that was imported
        result = SCENARIOS[name](rank)
        if rank.rank == 0:
            (rank.folder / f"{name}.json").write_text(json.dumps(result))
    dist.barrier()  # nobody leaves while another still uses the group
    dist.destroy_process_group()
    # As a run's ranks end, which are killed: now and then a process aborts while its interpreter shuts down ("terminate
    # called without an active exception"), perhaps for a thread of gloo's.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
