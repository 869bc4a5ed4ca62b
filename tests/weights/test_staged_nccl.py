"""What can be said of the staged NCCL end without a GPU: when the running model is touched. The broadcasts are made."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.system  # vLLM's import takes seconds


@pytest.fixture
def worker(monkeypatch):
    """Its end of the wire around a model of two weights; `let` lets a bucket arrive."""
    from vllm.model_executor.model_loader import reload

    from flux_ray.weights import nccl

    held = SimpleNamespace(let=threading.Semaphore(0), failed=None)
    calls = []

    def consumer(*, iterator, post_unpack_func, group, **_):
        assert group == "group"
        for name, (shape, dtype) in iterator:
            assert held.let.acquire(timeout=20)
            if held.failed:
                raise held.failed
            post_unpack_func([(name, torch.full(shape, 7.0, dtype=dtype))])

    class Model(torch.nn.Linear):
        def load_weights(self, pairs):
            calls.extend((name, tensor.tolist()) for name, tensor in pairs)

    monkeypatch.setattr(nccl, "packed_nccl_broadcast_consumer", consumer)
    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: calls.append("begin"))
    monkeypatch.setattr(reload, "finalize_layerwise_reload", lambda model, config: calls.append("end"))
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(nccl, "free_bytes", lambda device: held.free)
    held.free = 10**9
    of_vllm = SimpleNamespace(parallel_config=SimpleNamespace(tensor_parallel_size=1), model_config=None)
    held.end = nccl.StagedNCCLWeightTransferEngine(None, of_vllm, torch.device("cpu"), Model(1024, 1024))
    held.end.model_update_group, held.calls = "group", calls
    return held


UPDATE = {"names": ["a", "b"], "dtype_names": ["float32", "bfloat16"], "shapes": [[2], [1]]}


def test_the_model_is_left_alone_until_the_update_is_there(worker):
    worker.end.start_weight_update()
    worker.end.update_weights(UPDATE)  # returns though nothing has come
    worker.let.release(2)
    worker.end._arriving.result(timeout=20)
    assert worker.calls == []
    worker.end.finish_weight_update()
    assert worker.calls == ["begin", ("a", [7.0, 7.0]), ("b", [7.0]), "end"]


def test_a_gpu_without_room_for_a_second_copy_is_told_before_anything_is_sent(worker):
    worker.free = 3 * 2**20
    with pytest.raises(RuntimeError, match=r"needs 0\.0 GiB .* lower rollout\.engine_args\.gpu_memory_utilization"):
        worker.end.start_weight_update()
    worker.free = 5 * 2**20
    worker.end.start_weight_update()
    worker.end.parallel_config.tensor_parallel_size = 2  # each worker receives both shards
    with pytest.raises(RuntimeError, match="needs"):
        worker.end.start_weight_update()


def test_a_broadcast_that_failed_is_told_at_the_end(worker):
    worker.failed = RuntimeError("NCCL error: remote process exited")
    worker.end.start_weight_update()
    worker.end.update_weights(UPDATE)
    worker.let.release(2)
    with pytest.raises(RuntimeError, match="remote process exited"):
        worker.end.finish_weight_update()
    assert worker.calls == []


def test_vllm_finds_it_under_the_name_that_engines_ask_for(worker):
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from flux_ray.config import from_dict
    from flux_ray.rollout.engine import RolloutEngine
    from flux_ray.weights.gloo import register

    register()
    engine = RolloutEngine(from_dict({"weights.staging": "device"}), index=0, device="cuda", dtype="bfloat16",
                           weights_backend="nccl")
    assert WeightTransferEngineFactory._registry[engine._transfer]() is type(worker.end)
