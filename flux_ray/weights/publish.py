"""The trainer's end of a weight update, whatever the backend.

Takes:  the weights of a training rank (metadata, and the tensors in order), and a way to call every engine.
Gives:  `Publisher`: connect once per membership of engines, publish once per version; what each engine attests.
Knows:  vLLM's framework drives the round trip (start, send, finish) from rank 0; other ranks only join the gathers.
Never:  touches the driver or the object store with a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

from flux_ray import ports
from flux_ray.messages import Attested
from flux_ray.protocols import ServesWeights
from flux_ray.weights.checksum import Sums
from flux_ray.weights.sender import GlooSender
from flux_ray.weights.source import TrainerSource

#: Calls a method of ServesWeights on every engine, with one tuple of arguments for each, under a deadline; gives their
#: results.
CallEngines = Callable[[Callable[..., object], list[tuple[object, ...]]], list[Any]]


class Weights(Protocol):
    """What a training rank offers: names, types and full shapes, and the tensors in the same order (a collective)."""

    def weight_metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]: ...

    def iter_weights(self, bucket_bytes: int) -> Iterator[tuple[str, torch.Tensor]]: ...


class Sender(Protocol):
    """The open weight channel of rank 0: ours, or vLLM's."""

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


class EngineClient:
    """vLLM's control plane (its VLLMWeightSyncClient protocol) over engines that are independent of each other.

    `version` is what the next update brings, `step` how many updates it had, `served` what each engine says then. It is
    told the checksums of what was sent.
    """

    def __init__(self, call: CallEngines, workers_per_engine: Sequence[int], sums: Sums) -> None:
        self._call, self._sums = call, sums
        self._workers = list(workers_per_engine)
        self.version = self.step = 0
        self.served: list[Attested] = []

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each engine gets the rank of its first worker: vLLM itself only counts within one engine."""
        payloads: list[tuple[object, ...]] = []
        offset = init_info.get("rank_offset", 0)
        for workers in self._workers:
            info = dict(init_info)
            if "rank_offset" in info:
                info["rank_offset"] = offset
                offset += workers
            payloads.append((info,))
        self._call(ServesWeights.init_weight_transfer_engine, payloads)

    def set_staged(self, staged: bool) -> None:
        self._call(ServesWeights.set_staged, [(staged,)] * len(self._workers))

    def start_weight_update(self) -> None:
        self._call(ServesWeights.start_weight_update, [()] * len(self._workers))

    def update_weights(self, update_info: dict[str, Any]) -> None:
        if "ipc_handles" in update_info:
            from flux_ray.weights.ipc import plain

            update_info = {**update_info, "ipc_handles": plain(update_info["ipc_handles"])}
        self._call(ServesWeights.update_weights, [(update_info,)] * len(self._workers))

    def begin_weight_update(self, update_info: dict[str, object]) -> None:
        """start_weight_update and update_weights, for which an engine that computes is interrupted once."""
        self._call(ServesWeights.begin_weight_update, [(update_info,)] * len(self._workers))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        # vLLM's senders know no version.
        payload = (self.version, self.step, self._sums.given())
        self.served = self._call(ServesWeights.finish_weight_update, [payload] * len(self._workers))

    def finish_staged_update(self, num_rounds: int) -> None:
        """As finish_weight_update, once each engine has made the update ready in so many parts, beside its requests."""
        payload = (num_rounds, self.version, self.step, self._sums.given())
        self.served = self._call(ServesWeights.finish_staged_update, [payload] * len(self._workers))


class Publisher:
    """One rank's end. Every rank calls `publish`; `connect` on rank 0 alone opens the weight channel."""

    def __init__(
        self, weights: Weights, *, rank: int, backend: str, bucket_bytes: int, deadline_s: float,
        staged: bool | None = False,
    ) -> None:
        """`staged`: engines go on while the weights come in, and stop to load them (gloo alone); None: where the bytes
        go through shared memory, so that they need no memory for it."""
        self._weights = weights
        self._staged = staged
        self._rank = rank
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._deadline_s = deadline_s
        self._sender: Sender | None = None
        self._client: EngineClient | None = None

    @property
    def _joins(self) -> bool:
        """Whether this rank has an end of the weight channel."""
        return self._rank == 0 or self._backend == "ipc"

    def prepare(self) -> None:
        """Import what `connect` needs: vLLM for its own senders, seconds that are well spent while the engines load."""
        if self._joins and self._backend != "gloo":
            import vllm.distributed.weight_transfer.factory  # noqa: F401

    def connect(
        self, call: CallEngines, *, workers_per_engine: Sequence[int], address: str, port: int, send_dtype: str
    ) -> None:
        """Open the weight channel to these engines. A second call replaces the first: engines came or went.

        Raises what the rendezvous raises: each member waits at most weights.deadline_s for the others.
        """
        if not self._joins:
            return
        if self._sender is not None:
            self._sender.shutdown()
        source = TrainerSource(self._weights, bucket_bytes=self._bucket_bytes, dtype=getattr(torch, send_dtype))
        held = ports.taken(port)
        if held is not None:
            held.close()  # the sender listens by itself
        self._client = EngineClient(call, workers_per_engine, source.sums)
        world_size = 1 + sum(workers_per_engine)
        if self._backend == "gloo":
            sender = GlooSender(
                client=self._client, source=source, world_size=world_size, bucket_bytes=self._bucket_bytes,
                timeout_s=self._deadline_s, staged=self._staged)
            sender.connect(address)
            self._client.set_staged(sender.staged)
            self._sender = sender
        else:
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

            info = self._init_info(address, port, world_size=world_size)
            self._sender = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=source)

    def _init_info(self, address: str, port: int, *, world_size: int) -> object:
        """What vLLM's own sender is told."""
        if self._backend == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            return NCCLTrainerInitInfo(
                address, port, world_size, packed_buffer_size_bytes=self._bucket_bytes, rank=self._rank
            )
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # Unlike the others, ipc has one buffer that the largest parameter must fit into.
        largest = max(dtype.itemsize * math.prod(shape) for _, dtype, shape in self._weights.weight_metadata())
        return IPCTrainerInitInfo(
            packed=True, packed_buffer_size_bytes=max(self._bucket_bytes, largest), rank=self._rank
        )

    def publish(self, version: int, step: int) -> list[Attested]:
        """Send the present weights, of that step, to every engine, as `version`; each stops to load them and goes on by
        itself.

        Gives what each engine attests, where this is rank 0; nothing elsewhere.
        """
        if self._sender is None or self._client is None:
            for _ in self._weights.iter_weights(self._bucket_bytes):
                pass  # joins the gathers of a model that is sharded over ranks
            return []
        self._client.version, self._client.step = version, step
        self._sender.send_weights()
        return self._client.served
