"""The NCCL transfer that keeps a whole update on the GPU before it is loaded (weights.staging=device).

Takes:  vLLM's own NCCL transfer: its sender, its channel, its packed buckets.
Gives:  StagedNCCLWeightTransferEngine, the engine worker's end, registered by gloo.register as NCCL_STAGED.
Knows:  buckets arrive on streams of their own, beside the forward passes; the running model is touched at the end.
"""

from __future__ import annotations

from concurrent.futures import Future

import torch
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
    packed_nccl_broadcast_consumer,
)

from flux_ray.weights.attest import Receipts
from flux_ray.weights.background import in_background
from flux_ray.weights.buckets import Param

GIB = 2**30
Pairs = list[tuple[str, torch.Tensor]]


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still get on the GPU: the free ones, and those that its allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


class StagedNCCLWeightTransferEngine(NCCLWeightTransferEngine):
    """As vLLM's, at the price of a whole copy of the model on each worker's GPU: a worker takes its shard of what it is
    sent when it loads it. No GPU has run it yet."""

    _arriving: Future[list[Pairs]] | None = None
    receipts: Receipts | None = None  # of what came in; the worker asks it at the end

    def start_weight_update(self) -> None:
        """Nothing yet: the model goes on as it is. RuntimeError where its GPU has no room for the update: once the
        broadcasts have begun, the sender would wait for one that nobody receives."""
        workers = self.parallel_config.tensor_parallel_size
        self.receipts = self.receipts or Receipts(self.model, num_workers=workers)
        self.receipts.begin()
        needed, free = workers * sum(p.nbytes for p in self.model.parameters()), free_bytes(self.device)
        if needed > free:
            raise RuntimeError(f"weights.staging=device needs {needed / GIB:.1f} GiB on each engine's GPU beside the "
                               f"model, {free / GIB:.1f} GiB are free: lower "
                               "rollout.engine_args.gpu_memory_utilization, or use weights.staging=none")

    def update_weights(self, update_info: dict[str, object]) -> None:
        """Return at once. vLLM's own method waits here for all work of the GPU, the broadcasts included."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        assert self.model_update_group is not None, "init_transfer_engine comes first"
        self._arriving = in_background(lambda: self._received(update_info))

    def finish_weight_update(self) -> None:
        """The engine is paused. Waits for what has not come yet, then loads it."""
        from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check

        assert self._arriving is not None and self.receipts is not None, "receive_weights comes first"
        arrived, self._arriving = self._arriving.result(), None
        super().start_weight_update()
        self.receipts.expect(Param(name, there.dtype, tuple(there.shape)) for pairs in arrived for name, there in pairs)
        with disable_mtp_completeness_check():  # a bucket is never the whole model
            for pairs in arrived:
                self.receipts.take(pairs)
                self.model.load_weights(pairs)
        super().finish_weight_update()
        torch.accelerator.synchronize()

    def _received(self, update_info: NCCLWeightTransferUpdateInfo) -> list[Pairs]:
        """The update, bucket by bucket: each has memory of its own, which its tensors are views of."""
        if self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)  # a thread starts on the first
        rows = zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        buckets: list[Pairs] = []
        packed_nccl_broadcast_consumer(
            iterator=((name, (shape, getattr(torch, dtype))) for name, dtype, shape in rows),
            group=self.model_update_group,
            src=0,
            post_unpack_func=buckets.append,
            buffer_size_bytes=self.packed_buffer_size_bytes,
            num_buffers=self.packed_num_buffers,
            device=self.device,
        )
        return buckets
