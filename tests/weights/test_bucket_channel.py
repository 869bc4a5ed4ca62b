"""The wire between a sender and its workers: members in threads of this process, one gloo group."""

from __future__ import annotations

import datetime
import errno
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from flux_ray.weights import bucket_channel
from flux_ray.weights.bucket_channel import BucketChannel, create_memory, forget, join_group, map_memory

pytestmark = pytest.mark.unit
SIZES = (100, 64, 1000)  # bytes of each bucket
NUM_BYTES = 128 + 64 + 1024


def members(memories):
    """What each member's buckets hold after two updates; the first member sends."""
    timeout = datetime.timedelta(seconds=20)
    store = dist.TCPStore("127.0.0.1", 0, len(memories), is_master=True, timeout=timeout, wait_for_workers=False)

    def member(rank):
        group = join_group("127.0.0.1", store.port, rank=rank, world_size=len(memories), timeout_s=20.0,
                           store=store if rank == 0 else None)
        wire = BucketChannel(group, memories[rank])
        seen = []
        for update in range(2):
            wire.rewind()
            places = [wire.place(size) for size in SIZES]
            for k, place in enumerate(places):
                if rank == 0:
                    place.fill_(10 * update + k + 1)
                wire.broadcast(place).wait()
                seen.append(place.clone())
            group.barrier().wait()  # as the engines' answers: the next update starts after all have read
        return wire.shared, seen

    with ThreadPoolExecutor(len(memories)) as threads:
        return [done.result(timeout=60) for done in [threads.submit(member, rank) for rank in range(len(memories))]]


def test_bytes_arrive_through_the_memory_of_one_machine():
    name, memory = create_memory(NUM_BYTES)
    try:
        memories = [memory, map_memory(name, NUM_BYTES), map_memory(name, NUM_BYTES)]
    finally:
        forget(name)
    for shared, seen in members(memories):
        assert shared
        assert [int(bucket.min()) for bucket in seen] == [int(bucket.max()) for bucket in seen] == [1, 2, 3, 11, 12, 13]
    assert not (bucket_channel.SHARED_FOLDER / name).exists()


def test_one_member_elsewhere_and_all_go_through_gloo():
    name, memory = create_memory(NUM_BYTES)
    try:
        memories = [memory, map_memory(name, NUM_BYTES), map_memory("of another machine", NUM_BYTES)]
    finally:
        forget(name)
    for shared, seen in members(memories):
        assert not shared
        assert [int(bucket.max()) for bucket in seen] == [1, 2, 3, 11, 12, 13]
    assert (memory == 0).all()


def test_a_bucket_may_hold_any_type():
    memory = torch.zeros(NUM_BYTES, dtype=torch.uint8)
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=datetime.timedelta(seconds=20))
    wire = BucketChannel(join_group("127.0.0.1", store.port, rank=0, world_size=1, timeout_s=20.0, store=store), memory)
    assert [wire.place(size).storage_offset() for size in SIZES] == [0, 128, 192]


def test_no_room_for_the_memory(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = set(bucket_channel.SHARED_FOLDER.iterdir())
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert create_memory(NUM_BYTES) is None
    assert set(bucket_channel.SHARED_FOLDER.glob("flux_ray-weights-*")) <= before


def test_the_memory_is_for_its_owner_alone():
    name, _ = create_memory(NUM_BYTES)
    try:
        assert (bucket_channel.SHARED_FOLDER / name).stat().st_mode & 0o777 == 0o600
        assert map_memory(name, NUM_BYTES + 1) is None  # another update's
    finally:
        forget(name)
    forget(name)  # again is harmless
