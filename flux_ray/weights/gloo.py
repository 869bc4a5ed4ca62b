"""The engine worker's end of the gloo weight transfer: rank 0 of the trainer broadcasts packed buckets to it, on CPU.

Takes:  vLLM's weight-transfer framework (the same calls as its nccl backend).
Gives:  `register()`, an entry point of vLLM's general plugins; GlooWeightTransferEngine.
Knows:  the other end (sender.py) cuts the same buckets from the same metadata (buckets.py).
Never:  waits without a deadline: the store and each broadcast have one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.platforms import current_platform

from flux_ray.weights.attest import Receipts
from flux_ray.weights.background import in_background
from flux_ray.weights.bucket_channel import BucketChannel, join_group, map_memory
from flux_ray.weights.buckets import Announcement, Invitation, Param, buckets, num_rounds, size_of, unpack
from flux_ray.weights.cpu import routed_experts
from flux_ray.weights.cpu.experts import pack_anew
from flux_ray.weights.cpu.shadow_model import ShadowModel, TiedHead, can_have_shadow, tied_heads

BACKEND = "gloo"
NCCL_STAGED = "nccl_device"  # rollout engines ask for it where weights.staging=device
IPC_PLAIN = "ipc_plain"  # rollout engines ask for it in the place of ipc
Bucket: TypeAlias = tuple[list[Param], torch.Tensor]  # parameters in their order, and the bytes of them all


def register() -> None:
    """Put ours beside nccl and ipc in vLLM's registry; on CPU, have engines return the experts that they choose where
    they are asked to. Called once in each of vLLM's processes; again is harmless."""
    for backend, module, name in (
        (BACKEND, "gloo", "GlooWeightTransferEngine"),
        (NCCL_STAGED, "nccl", "StagedNCCLWeightTransferEngine"),
        (IPC_PLAIN, "ipc", "PlainIPCWeightTransferEngine"),
    ):
        if backend not in WeightTransferEngineFactory._registry:  # the factory offers no other way to ask
            WeightTransferEngineFactory.register_engine(backend, f"flux_ray.weights.{module}", name)
    if current_platform.is_cpu():
        routed_experts.allow()


@dataclass
class GlooInitInfo(Invitation, WeightTransferInitInfo):
    """An Invitation, as vLLM takes it."""


@dataclass
class GlooUpdateInfo(Announcement, WeightTransferUpdateInfo):
    """An Announcement, as vLLM takes it."""


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The engine worker's end: joins the group, receives buckets, loads them through vLLM's layerwise reload.

    Staged: into a shadow of the model, where it can have one.
    """

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _info: GlooInitInfo | None = None
    _channel: BucketChannel | None = None
    _arriving: Future[list[Bucket]] | None = None  # staged: what comes in beside the forward passes
    _tied: Sequence[TiedHead] = ()
    _has_shadow = False  # the model can be loaded beside itself
    _shadow: ShadowModel | None = None
    _left: Sequence[Bucket] = ()  # of the update, not loaded yet
    _each_round = 0  # buckets that a round loads
    receipts: Receipts | None = None  # of what came in; the worker asks it at the end

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self._info = init_info
        self._forget_staged()
        self._tied = tied_heads(self.model)
        if self.receipts is None:
            self.receipts = Receipts(self.model, num_workers=self.parallel_config.tensor_parallel_size)
        # A GPU loads in no time, and has no room for its weights twice.
        self._has_shadow = self.device.type == "cpu" and can_have_shadow(self.model)
        group = join_group(
            init_info.master_address,
            init_info.master_port,
            rank=init_info.rank_offset + self.parallel_config.rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )
        memory = map_memory(init_info.memory, init_info.memory_bytes) if init_info.memory else None
        self._channel = BucketChannel(group, memory)
        if init_info.staged is None:
            init_info.staged = self._channel.shared

    def start_weight_update(self) -> None:
        assert self._info is not None and self.receipts is not None, "init_transfer_engine comes first"
        self._forget_staged()
        self.receipts.begin()
        if not self._info.staged:
            self._start_load()

    def _forget_staged(self) -> None:
        """What is left of an update that failed half-way."""
        if self._shadow is not None:
            self._shadow.forget()
        self._shadow, self._arriving, self._left, self._each_round = None, None, (), 0

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load each bucket as it comes; staged: return at once, while they come in on a thread of their own. Then each
        call without names makes a part of them ready, between two forward passes of a model that goes on."""
        assert self._info is not None and self.receipts is not None, "init_transfer_engine comes first"
        if not update_info.names:
            return self._make_ready()
        self.receipts.expect(update_info.params())
        if not self._info.staged:
            return self._load(self._received(update_info))
        self._arriving = in_background(lambda: list(self._received(update_info)))
        if self._has_shadow:
            self._shadow = ShadowModel(self.model, self._tied)  # now, while the trainer still packs

    def _make_ready(self) -> None:
        assert self._arriving is not None and self.receipts is not None, "an update comes first"
        if self._shadow is None:
            return
        if not self._each_round:
            self._left = self._arriving.result()
            self._each_round = -(-len(self._left) // num_rounds(len(self._left)))
        part, self._left = self._left[: self._each_round], self._left[self._each_round :]
        for run, place in part:
            self._shadow.load(unpack(place, run))
        if part and not self._left:
            self._shadow.finish()
            self.receipts.read_ahead(self._shadow.of)

    def finish_weight_update(self) -> None:
        """The engine is paused. What could not be made ready before is loaded now."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        if self._shadow is not None:
            assert self._each_round and not self._left, "all of it is made ready before the engine is paused"
            self._shadow.put_in_place(self.model_config.dtype)
            return self._forget_staged()
        if self._arriving is not None:
            arrived = self._arriving.result()
            self._arriving = None
            self._start_load()
            self._load(arrived)
        finalize_layerwise_reload(self.model, self.model_config)
        for tied in self._tied:
            tied.renew()

    def _start_load(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        if self.device.type == "cpu":
            pack_anew(self.model)
        initialize_layerwise_reload(self.model)

    def _load(self, buckets: Iterable[Bucket]) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with disable_mtp_completeness_check():  # a bucket is never the whole model
            for run, place in buckets:
                self.model.load_weights(unpack(place, run))

    def _received(self, update_info: GlooUpdateInfo) -> Iterator[Bucket]:
        assert self._info is not None and self._channel is not None and self.receipts is not None
        self._channel.rewind()
        for run in buckets(update_info.params(), self._info.bucket_bytes):
            # A place of its own each: the reload keeps views of it until the layer they belong to is complete.
            place = self._channel.place(size_of(run))
            self._channel.broadcast(place).wait()
            self.receipts.take(unpack(place, run))
            yield run, place

    def shutdown(self) -> None:
        self._channel = None
