"""The gloo weight transfer: trainer rank 0 broadcasts packed buckets to every engine worker, on CPU.

Takes:  vLLM's weight-transfer framework (the same calls as its nccl backend) and a WeightSource of (name, tensor).
Gives:  `register()`, an entry point of vLLM's general plugins; the worker's and the trainer's engine classes.
Knows:  both sides cut the same buckets from the same metadata, so only tensors travel over the wire (wire.py).
Never:  waits without a deadline: the store and each broadcast have one; rank 0 or a dead engine is then named by
        the error.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

from flux_ray.weights.background import in_background
from flux_ray.weights.wire import SENDER_RANK, Wire, create_memory, forget, join_group, map_memory, padded

BACKEND = "gloo"
NCCL_STAGED = "nccl_device"  # rollout engines ask for it where weights.staging=device
IPC_PLAIN = "ipc_plain"  # rollout engines ask for it in the place of ipc
Bucket = tuple[list[ParamMeta], torch.Tensor]  # parameters in their order, and the bytes of them all


def register() -> None:
    """Put ours beside nccl and ipc in vLLM's registries. Called once in each of vLLM's processes; again is harmless."""
    for factory, backend, module, name in (
        (WeightTransferEngineFactory, BACKEND, "gloo", "GlooWeightTransferEngine"),
        (WeightTransferTrainerFactory, BACKEND, "gloo", "GlooTrainerWeightTransferEngine"),
        (WeightTransferEngineFactory, NCCL_STAGED, "nccl", "StagedNCCLWeightTransferEngine"),
        (WeightTransferEngineFactory, IPC_PLAIN, "ipc", "PlainIPCWeightTransferEngine"),
    ):
        if backend not in factory._registry:  # the factory offers no other way to ask
            factory.register_engine(backend, f"flux_ray.weights.{module}", name)


def buckets(meta: Sequence[ParamMeta], bucket_bytes: int) -> Iterator[list[ParamMeta]]:
    """Cut the parameters, in order, into runs of at most `bucket_bytes` (a larger parameter is a bucket by itself)."""
    run: list[ParamMeta] = []
    size = 0
    for param in meta:
        num_bytes = num_bytes_of(param)
        if run and size + num_bytes > bucket_bytes:
            yield run
            run, size = [], 0
        run.append(param)
        size += num_bytes
    if run:
        yield run


def num_bytes_of(param: ParamMeta) -> int:
    return param.dtype.itemsize * torch.Size(param.shape).numel()


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
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
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """What one round sends: names, dtypes and full shapes, in the order of the wire."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @classmethod
    def of(cls, meta: Sequence[ParamMeta]) -> GlooUpdateInfo:
        return cls(
            [m.name for m in meta], [str(m.dtype).removeprefix("torch.") for m in meta], [list(m.shape) for m in meta]
        )

    def meta(self) -> list[ParamMeta]:
        rows = zip(self.names, self.dtype_names, self.shapes, strict=True)
        return [ParamMeta(name, getattr(torch, dtype), tuple(shape)) for name, dtype, shape in rows]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """The engine worker's end: joins the group, receives buckets, loads them through vLLM's layerwise reload."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _info: GlooInitInfo | None = None
    _wire: Wire | None = None
    _arriving: Future[list[Bucket]] | None = None  # staged: what comes in beside the forward passes
    _tied: Sequence[TiedHead] = ()

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        self._info = init_info
        self._tied = tied_heads(self.model)
        group = join_group(
            init_info.master_address,
            init_info.master_port,
            rank=init_info.rank_offset + self.parallel_config.rank,
            world_size=init_info.world_size,
            timeout_s=init_info.timeout_s,
        )
        self._wire = Wire(group, map_memory(init_info.memory, init_info.memory_bytes) if init_info.memory else None)
        if init_info.staged is None:
            init_info.staged = self._wire.shared

    def start_weight_update(self) -> None:
        assert self._info is not None, "init_transfer_engine comes first"
        if not self._info.staged:
            self._start_load()

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Load each bucket as it comes; staged: return at once, while they come in on a thread of their own."""
        assert self._info is not None, "init_transfer_engine comes first"
        if not self._info.staged:
            return self._load(self._received(update_info))
        self._arriving = in_background(lambda: list(self._received(update_info)))

    def finish_weight_update(self) -> None:
        """The engine is paused. Waits for what is staged; each broadcast of it has its deadline."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

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

        initialize_layerwise_reload(self.model)

    def _load(self, buckets: Iterable[Bucket]) -> None:
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        with disable_mtp_completeness_check():  # a bucket is never the whole model
            for run, place in buckets:
                self.model.load_weights(unpack(place, run))

    def _received(self, update_info: GlooUpdateInfo) -> Iterator[Bucket]:
        assert self._info is not None and self._wire is not None
        self._wire.rewind()
        for run in buckets(update_info.meta(), self._info.bucket_bytes):
            # A place of its own each: the reload keeps views of it until the layer they belong to is complete.
            place = self._wire.place(sum(map(num_bytes_of, run)))
            self._wire.broadcast(place).wait()
            yield run, place

    def shutdown(self) -> None:
        self._wire = None


def unpack(bucket: torch.Tensor, run: Sequence[ParamMeta]) -> list[tuple[str, torch.Tensor]]:
    """Views of the bytes of one bucket, by name."""
    pieces = bucket.split([num_bytes_of(param) for param in run])
    return [(param.name, piece.view(param.dtype).view(param.shape)) for param, piece in zip(run, pieces, strict=True)]


class TiedHead(NamedTuple):
    """An LM head and the embedding whose weight it has.

    On CPU vLLM packs the head's weight into a buffer of its own at load. A reload replaces the embedding that it was
    packed from and leaves the packed copy old, which no checksum of parameters can see: tie again and pack again.
    """

    head: Any
    embedding: torch.nn.Module

    def renew(self) -> None:
        self.head.weight = self.embedding.weight
        self.head.quant_method.process_weights_after_loading(self.head)


def tied_heads(model: torch.nn.Module) -> list[TiedHead]:
    """Whatever a model calls them: heads that have one weight with another module."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    modules = [module for module in model.modules() if isinstance(getattr(module, "weight", None), torch.Tensor)]
    heads = [module for module in modules if isinstance(module, ParallelLMHead)]
    others = {id(module.weight): module for module in modules if not isinstance(module, ParallelLMHead)}
    return [TiedHead(head, others[id(head.weight)]) for head in heads if id(head.weight) in others]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """The trainer's end: where it listens, and how many are in the group (itself and all engine workers)."""

    backend: ClassVar[str] = BACKEND

    master_address: str
    world_size: int
    bucket_bytes: int
    timeout_s: float
    staged: bool | None = False  # None: where shared memory holds the update anyway


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """The trainer's end, on every rank: all gather each bucket (the source's collective), rank 0 packs and sends it."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(self, *, client: VLLMWeightSyncClient, source: WeightSource, init_info: GlooTrainerInitInfo) -> None:
        super().__init__(client=client, source=source, is_sender=init_info.is_sender)
        self._info = init_info
        self._store: Any = None
        self._wire: Wire | None = None

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> GlooTrainerWeightTransferEngine:
        assert source is not None, "gloo sends whole models: it needs a WeightSource"
        engine = cls(client=client, source=source, init_info=init_info)
        if engine.is_sender:
            engine._connect()
        return engine

    def _connect(self) -> None:
        info = self._info
        assert self.source is not None
        timeout = datetime.timedelta(seconds=info.timeout_s)
        self._store = dist.TCPStore(
            info.master_address, 0, info.world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        num_bytes = sum(padded(sum(map(num_bytes_of, run)))
                        for run in buckets(self.source.metadata(), info.bucket_bytes))
        name, memory = create_memory(num_bytes) or (None, None)
        worker = GlooInitInfo(
            info.master_address,
            self._store.port,
            info.world_size,
            rank_offset=1,
            bucket_bytes=info.bucket_bytes,
            timeout_s=info.timeout_s,
            staged=info.staged,
            memory=name,
            memory_bytes=num_bytes,
        )
        # The workers wait in their own join for us: ask them from a side thread while we join.
        try:
            with ThreadPoolExecutor(1) as side:
                joined = side.submit(self.client.init_weight_transfer_engine, asdict(worker))
                group = join_group(
                    info.master_address,
                    self._store.port,
                    rank=SENDER_RANK,
                    world_size=info.world_size,
                    timeout_s=info.timeout_s,
                    store=self._store,
                )
                self._wire = Wire(group, memory)
                joined.result()
        finally:
            if name is not None:
                forget(name)

    @property
    def staged(self) -> bool:
        """Whether an update comes in beside running requests: known once all have joined."""
        assert self._wire is not None
        return self._wire.shared if self._info.staged is None else self._info.staged

    def send_weights(self) -> None:
        assert self.source is not None
        meta = self.source.metadata()
        if not self.is_sender:
            for _ in self.source:  # joins the trainers' gathers; nothing is sent from here
                pass
            return
        self.client.start_weight_update()
        side = ThreadPoolExecutor(1)
        try:
            received = side.submit(self.client.update_weights, asdict(GlooUpdateInfo.of(meta)))
            self._send(meta, self.source)
            received.result()
        except Exception:
            cause = received.exception() if received.done() else None
            if cause is not None:  # an engine gave up; that the send then found nobody is what came of it
                raise cause from None
            raise
        finally:
            side.shutdown(wait=False)  # after a failed send the workers still wait for us: don't wait for them
        self.client.finish_weight_update()

    def _send(self, meta: Sequence[ParamMeta], source: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Pack bucket k+1 while bucket k is on its way."""
        assert self._wire is not None
        self._wire.rewind()
        tensors = iter(source)
        sending: tuple[Any, torch.Tensor] | None = None
        for run in buckets(meta, self._info.bucket_bytes):
            place = self._wire.place(sum(map(num_bytes_of, run)))
            for (_, there), param in zip(unpack(place, run), run, strict=True):
                name, tensor = next(tensors)
                assert name == param.name, f"the source gave {name} where its metadata says {param.name}"
                there.copy_(tensor)
            if sending is not None:
                sending[0].wait()
            sending = (self._wire.broadcast(place), place)
        if sending is not None:
            sending[0].wait()
        assert next(tensors, None) is None, "the source gave more than its metadata says"

    def shutdown(self) -> None:
        self._wire = self._store = None
