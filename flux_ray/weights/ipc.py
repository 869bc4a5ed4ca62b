"""vLLM's IPC transfer with handles that travel as plain values: its own are classes, which only a pickle can carry.

Takes:  what torch gives of a tensor on a GPU, for another process to open it there (reduce_tensor).
Gives:  `plain`, for the sender's end; PlainIPCWeightTransferEngine, the worker's, registered by gloo.register.
Knows:  the places in torch's arguments: 0 class, 1 size, 4 class of the storage, 5 type; bytes and numbers elsewhere.
Never:  makes a class of a name that it doesn't expect.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

from flux_ray.weights.attest import Receipts
from flux_ray.weights.buckets import Announcement

TENSOR, SIZE, STORAGE, DTYPE = 0, 1, 4, 5
STORAGES = {cls.__name__: cls for cls in (torch.storage.TypedStorage, torch.storage.UntypedStorage)}
PLAIN = (int, bool, bytes, type(None))


def plain(handles: dict[str, tuple[object, ...]]) -> dict[str, list[object]]:
    """Handles by GPU (its UUID), of a packed buffer, as text, numbers and bytes."""
    return {gpu: _plain(arguments) for gpu, arguments in handles.items()}


def _plain(arguments: tuple[Any, ...]) -> list[object]:
    values = list(arguments)
    assert values[TENSOR] is torch.Tensor, values[TENSOR]
    values[TENSOR] = None
    values[SIZE] = list(values[SIZE])
    values[SIZE + 1] = list(values[SIZE + 1])  # the strides
    values[STORAGE] = values[STORAGE].__name__
    values[DTYPE] = str(values[DTYPE]).removeprefix("torch.")
    rest = [value for place, value in enumerate(values) if place not in (TENSOR, SIZE, SIZE + 1, STORAGE, DTYPE)]
    assert all(isinstance(value, PLAIN) for value in rest), rest
    return values


def rebuilt(values: list[Any]) -> tuple[object, ...]:
    """What torch's rebuild_cuda_tensor takes."""
    arguments = list(values)
    arguments[TENSOR] = torch.Tensor
    arguments[SIZE] = torch.Size(values[SIZE])
    arguments[SIZE + 1] = tuple(values[SIZE + 1])
    arguments[STORAGE] = STORAGES[values[STORAGE]]
    arguments[DTYPE] = getattr(torch, values[DTYPE])
    return tuple(arguments)


class PlainIPCUpdateInfo(IPCWeightTransferUpdateInfo):
    """As vLLM's, from plain handles."""

    def __post_init__(self) -> None:
        handles = vars(self)["ipc_handles"]
        assert isinstance(handles, dict), "a packed buffer has one handle for each GPU"
        self.ipc_handles = {gpu: rebuilt(values) for gpu, values in handles.items()}
        super().__post_init__()


class PlainIPCWeightTransferEngine(IPCWeightTransferEngine):
    """As vLLM's. It sees names and not bytes, so that the model alone is compared with what was sent. No GPU has run
    that comparison yet."""

    update_info_cls = PlainIPCUpdateInfo
    receipts: Receipts | None = None

    def start_weight_update(self) -> None:
        self.receipts = self.receipts or Receipts(self.model, num_workers=self.parallel_config.tensor_parallel_size)
        self.receipts.begin()
        super().start_weight_update()

    def receive_weights(self, update_info: PlainIPCUpdateInfo) -> None:
        assert self.receipts is not None, "start_weight_update comes first"
        self.receipts.expect(Announcement(update_info.names, update_info.dtype_names, update_info.shapes).params())
        super().receive_weights(update_info)
