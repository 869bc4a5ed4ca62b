"""How the bytes of an update travel from the sender to the engine workers on CPU.

Takes:  a gloo group of the sender (rank 0) and all workers; how many bytes an update has.
Gives:  `join_group`; BucketChannel: a place for each bucket, and its broadcast.
Knows:  on one machine the bytes are written once, into memory that all map; gloo then carries a byte a bucket.
Never:  leaves a file behind: the memory's name is gone as soon as all have mapped it. Waits without a deadline.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from pathlib import Path

import torch
import torch.distributed as dist

SENDER_RANK = 0  # the trainer; engine workers follow from rank 1
SHARED_FOLDER = Path("/dev/shm")
ALIGNMENT = 64  # bytes, of a bucket's place: any type may lie there


def join_group(
    address: str, port: int, *, rank: int, world_size: int, timeout_s: float, store: dist.Store | None = None,
) -> dist.ProcessGroup:
    """A gloo group of its own (no default group is touched).

    Waits until all `world_size` members have come, at most `timeout_s`; the same bound holds for each broadcast.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    store = store or dist.TCPStore(address, port, world_size, is_master=False, timeout=timeout)
    return dist.ProcessGroupGloo(dist.PrefixStore("flux_ray/weights", store), rank, world_size, timeout)


class BucketChannel:
    """One member's end. All members ask for the same places in the same order, after a `rewind` each update."""

    def __init__(self, group: dist.ProcessGroup, memory: torch.Tensor | None) -> None:
        """`memory`: of one machine; used where every member of the group has it."""
        self._group = group
        have = torch.tensor([int(memory is not None)], dtype=torch.int32)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN
        group.allreduce([have], options).wait()
        self._memory = memory if int(have) else None
        self._at = 0

    @property
    def shared(self) -> bool:
        """Whether bytes go through shared memory."""
        return self._memory is not None

    def rewind(self) -> None:
        self._at = 0

    def place(self, num_bytes: int) -> torch.Tensor:
        """(num_bytes,) uint8, of the next bucket. Valid until the weight channel is rewound."""
        if self._memory is None:
            return torch.empty(num_bytes, dtype=torch.uint8)
        start, self._at = self._at, self._at + padded(num_bytes)
        return self._memory[start : start + num_bytes]

    def broadcast(self, place: torch.Tensor) -> dist.Work:
        """Work to wait for: then the bucket is there, with every worker."""
        options = dist.BroadcastOptions()
        options.rootRank = SENDER_RANK
        options.rootTensor = 0
        return self._group.broadcast([torch.empty(1, dtype=torch.uint8) if self.shared else place], options)


def padded(num_bytes: int) -> int:
    """
    >>> padded(1), padded(128)
    (64, 128)
    """
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def create_memory(num_bytes: int) -> tuple[str, torch.Tensor] | None:
    """Its name, and the bytes; None where the machine has no room for it. `forget` the name once others have it."""
    file = SHARED_FOLDER / f"flux_ray-weights-{secrets.token_hex(16)}"
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # now, or a write into a full file system kills the process
    except OSError:
        forget(file.name)
        return None
    finally:
        os.close(descriptor)
    return file.name, _mapped(file, num_bytes)


def map_memory(name: str, num_bytes: int) -> torch.Tensor | None:
    """The memory of that name; None where it isn't there: made on another machine, or in another container."""
    file = SHARED_FOLDER / name
    return _mapped(file, num_bytes) if file.is_file() and file.stat().st_size == num_bytes else None


def forget(name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        (SHARED_FOLDER / name).unlink()


def _mapped(file: Path, num_bytes: int) -> torch.Tensor:
    return torch.from_file(str(file), shared=True, size=num_bytes, dtype=torch.uint8)
