"""The trainer's weights in the shape that senders ask for, vLLM's and ours.

Takes:  a training rank's metadata and tensors.
Gives:  what vLLM calls a WeightSource: the same names and shapes, in the type that the engines hold.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from flux_ray.weights.buckets import Param
from flux_ray.weights.checksum import Sums

if TYPE_CHECKING:
    from flux_ray.weights.publish import Weights


class TrainerSource:
    def __init__(self, weights: Weights, *, bucket_bytes: int, dtype: torch.dtype) -> None:
        self._weights = weights
        self._bucket_bytes = bucket_bytes
        self._dtype = dtype
        self.sums = Sums()  # of what was given last

    def metadata(self) -> list[Param]:
        return [
            Param(name, self._send_dtype(dtype), tuple(shape)) for name, dtype, shape in self._weights.weight_metadata()
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self.sums.watch((name, tensor.to(self._send_dtype(tensor.dtype)))
                               for name, tensor in self._weights.iter_weights(self._bucket_bytes))

    @cached_property
    def _usual(self) -> torch.dtype:
        """What the trainer keeps most of its numbers in."""
        numbers: Counter[torch.dtype] = Counter()
        for _, dtype, shape in self._weights.weight_metadata():
            numbers[dtype] += math.prod(shape)
        return numbers.most_common(1)[0][0]

    def _send_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Weights travel as the engines hold them (half the bytes for bfloat16). What the trainer keeps in another type
        than most travels as it is: a router's correction, which is float32 beside bfloat16, would choose otherwise."""
        return self._dtype if dtype == self._usual else dtype
