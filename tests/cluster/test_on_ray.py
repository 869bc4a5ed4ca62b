"""A cluster that others started: what actors give stays with them; a call ends in a value or in one line,
or is cancelled where it runs."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import pytest

from flux_ray.cluster.group import ActorError
from flux_ray.cluster.plan import Plan, Role

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

DEADLINE_S = 60


class Store:
    def __init__(self) -> None:
        self.abandoned = 0

    async def waits(self) -> tuple[int, int]:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.abandoned += 1
            raise
        return 0, 0

    def num_abandoned(self) -> int:
        return self.abandoned

    def group(self, num_bytes: int) -> tuple[np.ndarray, int]:
        return np.zeros(num_bytes, np.uint8), num_bytes

    def sizes(self, arrays: dict[str, list[np.ndarray]]) -> list[int]:
        return [len(array) for array in arrays["anywhere"]]

    def breaks(self) -> None:
        raise KeyError("no such thing")


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no other process can import this file
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


async def test_results_stay_in_the_object_store_and_travel_by_reference(ray, tmp_path):
    from flux_ray.cluster.on_ray import Cluster

    cluster = Cluster(log_dir=tmp_path, plugins=[])
    cluster.connect(None, cpus=2)
    role = Role("store", count=2, cpus=1.0, gpus=0.0)
    try:
        await cluster.place(Plan("cpu", "gloo", (role,)), deadline_s=DEADLINE_S)
        group = cluster.spawn(role, env={})
        await group.build(Store, [{}, {}], deadline_s=DEADLINE_S)
        large, small = group.submit(0, "group", 20_000, num_returns=2)
        assert await group.result(small, index=0, what="group", deadline_s=DEADLINE_S) == 20_000
        for _ in range(100):  # where it lies is known a little after its size
            held = ray.experimental.get_local_object_locations([large])[large]
            if held["node_ids"]:
                break
            await asyncio.sleep(0.1)
        assert held["node_ids"], f"it came to the caller: {held}"
        assert await group.call(1, "sizes", {"anywhere": [large]}, deadline_s=DEADLINE_S) == [20_000]
        with pytest.raises(ActorError, match="store 0, breaks: KeyError: 'no such thing'"):
            await group.call(0, "breaks", deadline_s=DEADLINE_S)
        _, waiting = group.submit(0, "waits", num_returns=2)
        await group.call(0, "num_abandoned", deadline_s=DEADLINE_S)   # it has begun by now
        group.cancel(waiting)
        for _ in range(100):
            if abandoned := await group.call(0, "num_abandoned", deadline_s=DEADLINE_S):
                break
            await asyncio.sleep(0.1)
        assert abandoned == 1
        assert not cluster.first_death.done(), "it is cancelled where it runs, and the actor lives"
    finally:
        await asyncio.wait_for(cluster.close(), DEADLINE_S)
    assert ray.is_initialized(), "a cluster that was there before is left as it was"
