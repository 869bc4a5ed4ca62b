"""The trainer's end of the gloo transfer, on rank 0: it packs what is gathered and sends it to every engine worker.

Takes:  the trainer's weights (source.py), a way to call the engines (publish.EngineClient).
Gives:  GlooSender: one connection, `send_weights` for each version.
Knows:  bucket k + 1 is packed while bucket k is on its way.
Never:  imports vLLM: that would cost each start seconds and the trainer's process its memory. Waits without a deadline:
        the store and each broadcast have one; rank 0 or a dead engine is then named by the error.
"""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from typing import Protocol

import torch
import torch.distributed as dist

from flux_ray import ports
from flux_ray.weights.bucket_channel import SENDER_RANK, BucketChannel, create_memory, forget, join_group, padded
from flux_ray.weights.buckets import Announcement, Invitation, Param, buckets, num_rounds, size_of, unpack
from flux_ray.weights.source import TrainerSource

CAUSE_WAIT_S = 2.0  # for what an engine says of a send that failed: Ray tells of a dead one later than its socket does
LOOK_EVERY_S = 0.002  # whether a bucket has been taken, while no engine has said anything


class Engines(Protocol):
    """All engines, as a sender calls them."""

    def init_weight_transfer_engine(self, init_info: dict[str, object]) -> None: ...
    def begin_weight_update(self, update_info: dict[str, object]) -> None: ...
    def finish_weight_update(self) -> None: ...
    def finish_staged_update(self, num_rounds: int) -> None: ...


class GlooSender:
    def __init__(
        self, *, client: Engines, source: TrainerSource, world_size: int, bucket_bytes: int, timeout_s: float,
        staged: bool | None = False,
    ) -> None:
        """`world_size`: with all engine workers; `staged` None: where shared memory holds the update anyway."""
        self._client, self._source = client, source
        self._world_size, self._bucket_bytes, self._timeout_s = world_size, bucket_bytes, timeout_s
        self._staged = staged
        self._store: dist.Store | None = None
        self._channel: BucketChannel | None = None

    def connect(self, address: str) -> None:
        """Meet all engine workers: they find this end at `address`."""
        timeout = datetime.timedelta(seconds=self._timeout_s)
        listening = ports.listen(address)  # by itself a store would listen on all interfaces, and answer anybody
        self._store = dist.TCPStore(
            address, listening.getsockname()[1], self._world_size, is_master=True, timeout=timeout,
            wait_for_workers=False, master_listen_fd=listening.detach()
        )
        num_bytes = sum(padded(size_of(run)) for run in buckets(self._source.metadata(), self._bucket_bytes))
        name, memory = create_memory(num_bytes) or (None, None)
        worker = Invitation(
            address,
            self._store.port,
            self._world_size,
            rank_offset=1,
            bucket_bytes=self._bucket_bytes,
            timeout_s=self._timeout_s,
            staged=self._staged,
            memory=name,
            memory_bytes=num_bytes,
        )
        # The workers wait in their own join for us: ask them from a side thread while we join.
        try:
            with ThreadPoolExecutor(1) as side:
                joined = side.submit(self._client.init_weight_transfer_engine, asdict(worker))
                group = join_group(
                    address,
                    self._store.port,
                    rank=SENDER_RANK,
                    world_size=self._world_size,
                    timeout_s=self._timeout_s,
                    store=self._store,
                )
                self._channel = BucketChannel(group, memory)
                joined.result()
        finally:
            if name is not None:
                forget(name)

    @property
    def staged(self) -> bool:
        """Whether an update comes in beside running requests: known once all have joined."""
        assert self._channel is not None
        return self._channel.shared if self._staged is None else self._staged

    def send_weights(self) -> None:
        params = self._source.metadata()
        side = ThreadPoolExecutor(1)
        received = side.submit(self._client.begin_weight_update, asdict(Announcement.of(params)))
        try:
            self._send(params, self._source, received)
            received.result()
        except Exception:
            wait([received], timeout=CAUSE_WAIT_S)
            cause = received.exception() if received.done() else None
            if cause is not None:  # an engine gave up; that the send then found nobody is what came of it
                raise cause from None
            raise
        finally:
            side.shutdown(wait=False)  # after a failed send the workers still wait for us: don't wait for them
        if self.staged:
            self._client.finish_staged_update(num_rounds(sum(1 for _ in buckets(params, self._bucket_bytes))))
        else:
            self._client.finish_weight_update()

    def _send(
        self, params: Sequence[Param], source: Iterable[tuple[str, torch.Tensor]], received: Future[None]
    ) -> None:
        """Pack bucket k + 1 while bucket k is on its way; all of them where there is memory for all of them anyway."""
        assert self._channel is not None
        self._channel.rewind()
        tensors = iter(source)
        sending: deque[dist.Work] = deque()
        places = _places(self._channel, self._bucket_bytes)
        for run in buckets(params, self._bucket_bytes):
            place = places(size_of(run))
            for (_, there), param in zip(unpack(place, run), run, strict=True):
                name, tensor = next(tensors)
                assert name == param.name, f"the source gave {name} where its metadata says {param.name}"
                there.copy_(tensor)
            if sending and not self._channel.shared:
                _taken(sending.popleft(), received)
            sending.append(self._channel.broadcast(place))
        for work in sending:
            _taken(work, received)
        assert next(tensors, None) is None, "the source gave more than its metadata says"

    def shutdown(self) -> None:
        self._channel = self._store = None


def _places(channel: BucketChannel, bucket_bytes: int) -> Callable[[int], torch.Tensor]:
    """Gives the next bucket's place, of so many bytes: in the shared memory, or one of two that take turns.

    A rank's heap keeps what was freed: new memory for each bucket would leave gaps in it, and grow by seven buckets.
    """
    if channel.shared:
        return channel.place
    two = deque(torch.empty(0, dtype=torch.uint8) for _ in range(2))

    def place(num_bytes: int) -> torch.Tensor:
        two.rotate()
        if len(two[0]) < num_bytes:
            two[0] = torch.empty(max(num_bytes, bucket_bytes), dtype=torch.uint8)
        return two[0][:num_bytes]

    return place


def _taken(work: dist.Work, received: Future[None]) -> None:
    """Waits until a bucket is with all workers; no longer where an engine has said that it can't take it."""
    while not work.is_completed():
        wait([received], timeout=LOOK_EVERY_S)
        if received.done():
            received.result()
            break
    work.wait()
