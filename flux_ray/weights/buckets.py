"""What both ends of a gloo transfer must agree on. No vLLM: the trainer's end has none of it to import.

Takes:  parameters in the order in which they are sent: name, type as sent, whole shape.
Gives:  `buckets`, which cuts them; `unpack`; Invitation and Announcement, what an engine's worker is told.
Knows:  both sides cut the same buckets from the same metadata, so only tensors are sent (bucket_channel.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from flux_ray.weights.bucket_channel import padded

BUCKETS_A_ROUND = 2  # made ready at a time: running requests wait for them
MOST_ROUNDS = 8  # of a staged update: each waits for a forward pass, whatever the model's size


@dataclass(frozen=True)
class Param:
    """A parameter as it travels: named as in a checkpoint. What vLLM calls ParamMeta."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def padded_bytes(self) -> int:
        """Bytes that it has in a bucket: whatever follows it begins where any type may."""
        return padded(self.num_bytes)


def buckets(params: Sequence[Param], bucket_bytes: int) -> Iterator[list[Param]]:
    """Cut the parameters, in order, into runs of at most `bucket_bytes` (a larger parameter is a bucket by itself)."""
    run: list[Param] = []
    size = 0
    for param in params:
        if run and size + param.padded_bytes > bucket_bytes:
            yield run
            run, size = [], 0
        run.append(param)
        size += param.padded_bytes
    if run:
        yield run


def num_rounds(num_buckets: int) -> int:
    """The number of parts in which so many buckets are made ready.

    >>> num_rounds(1), num_rounds(4), num_rounds(240)
    (1, 2, 8)
    """
    return min(-(-num_buckets // BUCKETS_A_ROUND), MOST_ROUNDS)


def size_of(run: Sequence[Param]) -> int:
    """Bytes of one bucket."""
    return sum(param.padded_bytes for param in run)


def unpack(bucket: torch.Tensor, run: Sequence[Param]) -> list[tuple[str, torch.Tensor]]:
    """Views of the bytes of one bucket, by name."""
    pieces = bucket.split([param.padded_bytes for param in run])
    return [(param.name, piece[: param.num_bytes].view(param.dtype).view(param.shape))
            for param, piece in zip(run, pieces, strict=True)]


@dataclass
class Invitation:
    """What a worker needs to join; `rank_offset` is the rank of its engine's first worker."""

    master_address: str
    master_port: int
    world_size: int
    rank_offset: int
    bucket_bytes: int
    timeout_s: float
    staged: bool | None  # keep a whole update beside the running model, and load it when it has come
    memory: str | None  # name of the memory that a whole update goes through, where this is the sender's machine
    memory_bytes: int


@dataclass
class Announcement:
    """What one round sends: names, dtypes and full shapes, in the order of the weight channel.

    Without any it asks for the next of `num_rounds` parts of what was sent to be made ready.
    """

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)

    @classmethod
    def of(cls, params: Sequence[Param]) -> Announcement:
        return cls([p.name for p in params], [str(p.dtype).removeprefix("torch.") for p in params],
                   [list(p.shape) for p in params])

    def params(self) -> list[Param]:
        rows = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return [Param(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]
