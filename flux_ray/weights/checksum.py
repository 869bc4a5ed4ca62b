"""One number for the bytes of a tensor, the same on a CPU and on a GPU.

Takes:  a tensor, of any type and shape.
Gives:  `checksum`, and Sums: those of an update by the parameters' names, made as the trainer gives each.
Knows:  each 8 bytes have a weight of their own, so that what is swapped shows, halves of a tensor too. One pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

COLUMNS = 4096  # words of a row: its weights stay in a processor's cache
WORDS, ROWS = 1, 2  # what has weights: else a word and its mirror image could be swapped
_weights: dict[tuple[torch.device, int, int], Tensor] = {}


def checksum(tensor: Tensor) -> Tensor:
    """() int64, of the bytes as they lie in a contiguous tensor. A single word that differs always shows."""
    whole_tensor = tensor.detach().contiguous()
    # A dimension of one element may have any stride, and view would refuse it.
    data = whole_tensor.as_strided((whole_tensor.numel(),), (1,)).view(torch.uint8)
    whole = data.numel() // 8 * 8
    aligned = data.storage_offset() % 8 == 0
    words = (data[:whole] if aligned else data[:whole].clone()).view(torch.int64)
    num_rows = words.numel() // COLUMNS
    total = torch.full((), data.numel(), dtype=torch.int64, device=data.device)
    if num_rows:
        total = total + _dot(_rows(words, num_rows), _of(num_rows, words.device, of=ROWS))
    rest = words[num_rows * COLUMNS:]
    if whole < data.numel():
        rest = torch.cat([rest, pad(data[whole:], (0, 8 - (data.numel() - whole))).view(torch.int64)])
    return total + _dot(rest, _of(COLUMNS + 1, rest.device)[:rest.numel()]) * 3


def _rows(words: Tensor, num_rows: int) -> Tensor:
    """(num_rows,) the weighted sum of each row, modulo 2 ** 64."""
    table = words[:num_rows * COLUMNS].view(num_rows, COLUMNS)
    weights = _of(COLUMNS, words.device)
    return table.mv(weights) if table.device.type == "cpu" else (table * weights).sum(1)  # a GPU has no mv of integers


def _dot(words: Tensor, weights: Tensor) -> Tensor:
    return (words * weights).sum()


def _of(num: int, device: torch.device, *, of: int = WORDS) -> Tensor:
    """(num,) odd numbers: a factor that is odd loses no bit of a difference. The same in every process."""
    size = max(COLUMNS + 1, 1 << (num - 1).bit_length())
    if (device, size, of) not in _weights:
        generator = torch.Generator().manual_seed(4 * size + of)
        drawn = torch.randint(-2**62, 2**62, (size,), generator=generator, device="cpu")
        _weights[device, size, of] = (drawn * 2 + 1).to(device)
    return _weights[device, size, of][:num]


class Sums:
    """The checksums of the update that is sent now. A second pass over the tensors begins anew."""

    def __init__(self) -> None:
        self._of: dict[str, Tensor] = {}

    def watch(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors, each with its checksum taken."""
        self._of = {}
        for name, tensor in tensors:
            self._of[name] = checksum(tensor)
            yield name, tensor

    def given(self) -> dict[str, int]:
        return {name: int(value) for name, value in self._of.items()}
