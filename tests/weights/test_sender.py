"""The sender's end of the gloo transfer: whom it names where an update fails, what both ends agree on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux_ray.messages import Attested
from flux_ray.protocols import ServesWeights
from flux_ray.weights.bucket_channel import BucketChannel, join_group, map_memory
from flux_ray.weights.buckets import Announcement, Param, buckets, size_of, unpack
from flux_ray.weights.checksum import Sums
from flux_ray.weights.publish import EngineClient, Publisher
from flux_ray.weights.sender import GlooSender
from flux_ray.weights.source import TrainerSource

REPO = Path(__file__).parents[2]

pytestmark = pytest.mark.unit


def test_an_engine_that_gave_up_is_named_and_not_the_send_that_then_found_nobody(monkeypatch):
    told = threading.Event()

    class Client:
        def begin_weight_update(self, update_info):
            assert told.wait(10)
            time.sleep(0.1)  # Ray tells of it a moment after the connection broke
            raise ValueError("engine 0, begin_weight_update: no layer of that name")

    def finds_nobody(*_):
        told.set()
        raise RuntimeError("Timed out waiting 120000ms for send operation to complete")

    source = SimpleNamespace(metadata=list)
    engine = GlooSender(client=Client(), source=source, world_size=2, bucket_bytes=64, timeout_s=1.0)
    monkeypatch.setattr(engine, "_send", finds_nobody)
    with pytest.raises(ValueError, match="no layer of that name"):
        engine.send_weights()


class Worker:
    """An engine's worker that joins, and what it does of an update."""

    def __init__(self, takes):
        self._takes = takes

    def init_weight_transfer_engine(self, init_info):
        self.invitation = init_info
        group = join_group(init_info["master_address"], init_info["master_port"], rank=1,
                           world_size=init_info["world_size"], timeout_s=init_info["timeout_s"])
        memory = map_memory(init_info["memory"], init_info["memory_bytes"]) if self.same_machine else None
        self.wire = BucketChannel(group, memory)

    same_machine = True
    served = 0

    def begin_weight_update(self, update_info):
        self.took = self._takes(self, Announcement(**update_info).params())

    def finish_weight_update(self):
        self.served += 1

    def finish_staged_update(self, num_rounds):
        self.served += 1


WEIGHTS = {name: torch.full((30,), float(i)) for i, name in enumerate("abcde")}  # two to a bucket


def source_of(weights):
    return TrainerSource(SimpleNamespace(
        weight_metadata=lambda: [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()],
        iter_weights=lambda bucket_bytes: iter(weights.items())), bucket_bytes=256, dtype=torch.float32)


def connected(worker, *, timeout_s):
    sender = GlooSender(client=worker, source=source_of(WEIGHTS), world_size=2, bucket_bytes=256, timeout_s=timeout_s)
    sender.connect("127.0.0.1")
    return sender


def sent(sender):
    """In a thread, so that a test whose send hangs fails."""
    side = ThreadPoolExecutor(1)
    try:
        return side.submit(sender.send_weights).result(timeout=30)
    finally:
        side.shutdown(wait=False)


@pytest.mark.parametrize("same_machine", [True, False])
def test_a_worker_that_comes_late_finds_every_bucket(same_machine):
    """Through memory of one machine all are on their way before it takes the first, else one at a time is."""

    def late(worker, params):
        time.sleep(0.3)
        worker.wire.rewind()
        took = {}
        for run in buckets(params, worker.invitation["bucket_bytes"]):
            place = worker.wire.place(size_of(run))
            worker.wire.broadcast(place).wait()
            took |= {name: tensor.clone() for name, tensor in unpack(place, run)}
        return took

    worker = Worker(late)
    worker.same_machine = same_machine
    sender = connected(worker, timeout_s=20.0)
    for update in range(2):
        sent(sender)
        assert worker.served == update + 1
        assert {name: tensor.tolist() for name, tensor in worker.took.items()} == {
            name: tensor.tolist() for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("same_machine", [True, False])
def test_an_engine_that_refuses_is_not_waited_for(same_machine):
    """Nobody takes what was sent: without a look at the engine's answer the send would wait until the deadline."""

    def refuses(worker, params):
        raise ValueError("engine 0, begin_weight_update: no room")

    worker = Worker(refuses)
    worker.same_machine = same_machine
    sender = connected(worker, timeout_s=60.0)
    with pytest.raises(ValueError, match="no room"):
        sent(sender)
    assert not worker.served


@pytest.mark.parametrize("shared", [False, True])
def test_a_bucket_is_packed_while_the_one_before_is_on_its_way(shared, monkeypatch):
    """And none twice, however many engines there are: a broadcast is one for all of them. Without shared memory two
    places are used in turn."""
    did, places = [], []
    first_of = {run[0].name: k for k, run in enumerate(buckets(source_of(WEIGHTS).metadata(), 256))}

    class Recorded:
        def __init__(self):
            self.shared = shared

        def rewind(self):
            did.clear()

        def place(self, num_bytes):
            return torch.empty(num_bytes, dtype=torch.uint8)

        def broadcast(self, place):
            k = len(places)
            places.append(place.data_ptr())
            did.append(f"send {k}")
            return SimpleNamespace(is_completed=lambda: True, wait=lambda: did.append(f"sent {k}"))

    class Source(TrainerSource):
        def __iter__(self):
            for name, tensor in super().__iter__():
                did.extend([f"pack {first_of[name]}"] if name in first_of else [])
                yield name, tensor

    client = SimpleNamespace(begin_weight_update=lambda info: None, finish_weight_update=lambda: None)
    source = Source(source_of(WEIGHTS)._weights, bucket_bytes=256, dtype=torch.float32)
    sender = GlooSender(client=client, source=source, world_size=9, bucket_bytes=256, timeout_s=1.0)
    monkeypatch.setattr(sender, "_channel", Recorded())
    monkeypatch.setattr(GlooSender, "staged", False)
    sender.send_weights()
    one_on_its_way = ["pack 0", "send 0", "pack 1", "sent 0", "send 1", "pack 2", "sent 1", "send 2", "sent 2"]
    all_on_their_way = ["pack 0", "send 0", "pack 1", "send 1", "pack 2", "send 2", "sent 0", "sent 1", "sent 2"]
    assert did == (all_on_their_way if shared else one_on_its_way)
    assert shared or (places[0] == places[2] != places[1])


def test_every_engine_is_told_version_and_step_and_says_what_it_serves():
    calls = []

    def call(method, payloads):
        calls.append((method, payloads))
        return [Attested("7")] * len(payloads) if "finish" in method.__name__ else [None] * len(payloads)

    sums = Sums()
    list(sums.watch([("a", torch.ones(1))]))
    client = EngineClient(call, [1, 1, 1], sums)
    client.version, client.step = 7, 5
    client.begin_weight_update({"names": ["a"]})
    client.finish_weight_update()
    client.finish_staged_update(2)
    assert calls == [(ServesWeights.begin_weight_update, [({"names": ["a"]},)] * 3),
                     (ServesWeights.finish_weight_update, [(7, 5, sums.given())] * 3),
                     (ServesWeights.finish_staged_update, [(2, 7, 5, sums.given())] * 3)]
    assert client.served == [Attested("7")] * 3 and set(sums.given()) == {"a"}


def test_an_engines_first_worker_comes_after_all_workers_of_those_before_it():
    infos = []
    client = EngineClient(lambda method, payloads: infos.extend(info for (info,) in payloads) or [], [2, 1, 4],
                          Sums())
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    assert [info["rank_offset"] for info in infos] == [1, 3, 4]


def test_a_rank_without_an_end_of_the_channel_joins_the_gathers_alone():
    gathered = []
    weights = SimpleNamespace(iter_weights=lambda bucket_bytes: (gathered.append(name) for name in "ab"))
    publisher = Publisher(weights, rank=1, backend="gloo", bucket_bytes=1, deadline_s=1.0)
    publisher.connect(None, workers_per_engine=[1], address="127.0.0.1", port=0, send_dtype="float32")
    assert publisher.publish(version=3, step=2) == [] and gathered == ["a", "b"]


def test_a_training_rank_needs_no_vllm_where_weights_go_by_gloo():
    """Its import costs every start seconds of a core, and the rank's process its memory."""
    code = ("import sys; sys.modules['vllm'] = None\n"
            "import flux_ray.run.actors, flux_ray.weights.publish as publish\n"
            "publish.Publisher(None, rank=0, backend='gloo', bucket_bytes=1, deadline_s=1.0).prepare()")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_both_ends_cut_the_same_buckets_from_what_travels():
    params = [Param("a", torch.float32, (4, 4)), Param("b", torch.bfloat16, (3,)), Param("c", torch.int64, ()),
              Param("d", torch.float32, (100,))]
    announced = Announcement(**asdict(Announcement.of(params))).params()
    assert announced == params
    cut = [[param.name for param in run] for run in buckets(announced, 200)]
    assert cut == [["a", "b", "c"], ["d"]], "a larger parameter is a bucket by itself"
    run = params[:3]
    tensors = dict(unpack(torch.arange(size_of(run), dtype=torch.uint8), run))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        p.name: (p.dtype, p.shape) for p in run}
