"""A cluster that others started loses a node and gets another one: who was there stands on that one, and goes on."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from flux_ray.audit import audit
from tests.system.program import actor_of, metrics
from tests.system.small_run import assert_same, options

pytestmark = [pytest.mark.system, pytest.mark.all, pytest.mark.timeout(900)]

NUM_STEPS, IS_LOST_AT, CHECKPOINT_EVERY = 16, 6, 4
BETWEEN_S = 10.0  # without the node
BACK_DEADLINE_S = 240.0  # until the next step beyond all before, once there is another node
NODE_CPUS = 2
#: The run asks for 5 CPUs: two of an engine and the rollout worker beside it, two of ranks, one of rewards. Which actor
#: is on the node that is lost ► CPUs of the head, number of other nodes.
CLUSTERS = {"trainer-1": (3, 1), "engine-0": (1, 2)}


@pytest.fixture
def cluster(request) -> Iterator:
    """Nodes on this machine, each with a raylet of its own."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    head_cpus, num_others = CLUSTERS[request.param]
    head = {"num_cpus": head_cpus, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(num_others):
            cluster.add_node(num_cpus=NODE_CPUS)
        yield cluster
    finally:
        cluster.shutdown()


def node_of(cluster, actor: psutil.Process):
    """The node whose raylet has started the actor. The head can't be lost."""
    (found,) = [node for node in cluster.worker_nodes
                if actor.ppid() in [one.process.pid for one in node.all_processes["raylet"]]]
    return found


@pytest.mark.parametrize(("cluster", "lost"), [(name, name) for name in CLUSTERS], indirect=["cluster"], ids=CLUSTERS)
def test_a_run_goes_on_where_a_node_is_lost_and_another_comes(toys, tmp_path, start, cluster, lost):
    values = {**options(toys, toys.tied), "data.train": toys.data, "driver.num_steps": NUM_STEPS,
              "checkpoint.every": CHECKPOINT_EVERY, "cluster.address": cluster.address,
              "cluster.allow_open": True}

    def started(name):
        return start(*(f"{key}={value}" for key, value in {**values, "run_dir": tmp_path / name}.items()),
                     folder=tmp_path / f"of {name}")

    run_dir = tmp_path / "run"
    program = started("run")
    program.wait_for_steps(IS_LOST_AT, run_dir=run_dir)
    node = node_of(cluster, actor_of(run_dir / "logs" / f"{lost}.log"))
    cluster.remove_node(node, allow_graceful=False)
    time.sleep(BETWEEN_S)
    done = len(metrics(run_dir))
    cluster.add_node(num_cpus=NODE_CPUS)
    there_s = time.monotonic()
    program.wait_for_steps(done + 1, run_dir=run_dir, deadline_s=BACK_DEADLINE_S)
    print(f"the next step came {time.monotonic() - there_s:.0f} s after the node")
    assert program.end(deadline_s=BACK_DEADLINE_S) == 0, program.shown
    assert f"{lost.replace('-', ' ')} died" in (run_dir / "run.log").read_text()
    assert audit(run_dir).is_clean
    assert started("undisturbed").end() == 0
    assert_same(run_dir, tmp_path / "undisturbed")
