"""Handles of tensors on a GPU, made here, on the way that vLLM sends them to the process in which it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.system  # vLLM's import takes seconds

#: What torch.multiprocessing.reductions.reduce_tensor gives of a tensor of 8 bytes on a GPU, but for the function.
ARGUMENTS = (torch.Tensor, torch.Size([8]), (1,), 0, torch.storage.TypedStorage, torch.uint8, 0, b"handle\xff", 8, 0,
             False, b"counter", 0, b"event", True)
UPDATE = {"names": ["a"], "dtype_names": ["float32"], "shapes": [[2]], "tensor_sizes": [8]}


@pytest.fixture
def sent(monkeypatch):
    """A value as vLLM's other process gets it."""
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    monkeypatch.delenv("VLLM_ALLOW_INSECURE_SERIALIZATION", raising=False)
    return lambda value: MsgpackDecoder(Any).decode(MsgpackEncoder().encode(value))


def test_handles_arrive_as_they_were(sent):
    from flux_ray.weights.ipc import PlainIPCUpdateInfo, PlainIPCWeightTransferEngine, plain

    with pytest.raises(TypeError):
        sent({"GPU-1": ARGUMENTS})
    handles = sent(plain({"GPU-1": ARGUMENTS}))
    assert PlainIPCWeightTransferEngine.update_info_cls is PlainIPCUpdateInfo
    assert PlainIPCUpdateInfo(**UPDATE, ipc_handles=handles).ipc_handles == {"GPU-1": ARGUMENTS}


def test_the_sender_s_client_makes_them_plain():
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from flux_ray.protocols import ServesWeights
    from flux_ray.weights.checksum import Sums
    from flux_ray.weights.gloo import register
    from flux_ray.weights.publish import EngineClient

    register()
    assert WeightTransferEngineFactory._registry["ipc_plain"]().__name__ == "PlainIPCWeightTransferEngine"
    calls = []
    client = EngineClient(lambda method, payloads: calls.append((method, payloads)) or [], [1, 1], Sums())
    client.update_weights({**UPDATE, "ipc_handles": {"GPU-1": ARGUMENTS}})
    ((method, payloads),) = calls
    assert method is ServesWeights.update_weights and len(payloads) == 2
    assert payloads[0][0]["ipc_handles"]["GPU-1"][4:6] == ["TypedStorage", "uint8"]


def test_an_unknown_class_is_refused():
    from flux_ray.weights.ipc import plain, rebuilt

    (values,) = plain({"GPU-1": ARGUMENTS}).values()
    with pytest.raises(KeyError):
        rebuilt([*values[:4], "system", *values[5:]])
