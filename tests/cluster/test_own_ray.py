"""A Ray of the run's own whose server dies: nothing waits for it, and this process lives to tell."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.house.source import REPO

pytestmark = [pytest.mark.system, pytest.mark.timeout(180)]

PROGRAM = """
import asyncio, collections, sys
from pathlib import Path
from flux_ray.cluster.group import ActorDied
from flux_ray.cluster.groups import Cluster
from flux_ray.cluster.plan import Plan, Role

ROLE = Role("worker", count=1, cpus=0.5, gpus=0.0)

async def main(logs):
    cluster = Cluster(log_dir=logs, plugins=[])
    cluster.connect(None, cpus=1)
    await cluster.place(Plan("cpu", "gloo", (ROLE,)), deadline_s=60)
    group = cluster.spawn(ROLE, env={})
    await group.build(collections.Counter, [{}], deadline_s=60)
    cluster._own._processes["gcs_server"].kill()
    group[0].kill()
    replacing = asyncio.create_task(group.replace(0, deadline_s=60))   # as the supervisor does
    print(await asyncio.wait_for(cluster.death(), 10))
    replacing.cancel()
    for asks in (cluster.num_gpus, lambda: asyncio.run(cluster.place(Plan("cpu", "gloo", (ROLE,)), deadline_s=60))):
        try:
            await asyncio.wait_for(asyncio.to_thread(asks), 10)
        except ActorDied:
            print("refused")
    return cluster

cluster = asyncio.run(main(Path(sys.argv[1])))
asyncio.run(cluster.close())
print("closed")
"""


def test_after_the_death_of_rays_server_an_actor_that_dies_too_holds_up_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=REPO, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done
    told, *others = done.stdout.splitlines()
    assert told.startswith("Ray's gcs_server (process ") and told.endswith(") died"), done
    assert others == ["refused", "refused", "closed"], done
