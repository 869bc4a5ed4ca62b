"""The sender's end of the gloo transfer: whom it names where an update fails, what both ends agree on."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flux_ray.weights.buckets import Announcement, Param, buckets, size_of, unpack
from flux_ray.weights.sender import GlooSender

REPO = Path(__file__).parents[2]

pytestmark = pytest.mark.unit


def test_an_engine_that_gave_up_is_named_and_not_the_send_that_then_found_nobody(monkeypatch):
    told = threading.Event()

    class Client:
        def begin_weight_update(self, update_info):
            assert told.wait(10)
            time.sleep(0.1)  # Ray tells of it a moment after the connection broke
            raise ValueError("engine 0, begin_weight_update: no layer of that name")

    def finds_nobody(*_):
        told.set()
        raise RuntimeError("Timed out waiting 120000ms for send operation to complete")

    source = SimpleNamespace(metadata=list)
    engine = GlooSender(client=Client(), source=source, world_size=2, bucket_bytes=64, timeout_s=1.0)
    monkeypatch.setattr(engine, "_send", finds_nobody)
    with pytest.raises(ValueError, match="no layer of that name"):
        engine.send_weights()


def test_a_training_rank_needs_no_vllm_where_weights_go_by_gloo():
    """Its import costs every start seconds of a core, and the rank's process its memory."""
    code = ("import sys; sys.modules['vllm'] = None\n"
            "import flux_ray.driver.roles, flux_ray.weights.publish as publish\n"
            "publish.Publisher(None, rank=0, backend='gloo', bucket_bytes=1, deadline_s=1.0).prepare()")
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_both_ends_cut_the_same_buckets_from_what_travels():
    params = [Param("a", torch.float32, (4, 4)), Param("b", torch.bfloat16, (3,)), Param("c", torch.int64, ()),
              Param("d", torch.float32, (100,))]
    announced = Announcement(**asdict(Announcement.of(params))).params()
    assert announced == params
    cut = [[param.name for param in run] for run in buckets(announced, 200)]
    assert cut == [["a", "b", "c"], ["d"]], "a larger parameter is a bucket by itself"
    run = params[:3]
    tensors = dict(unpack(torch.arange(size_of(run), dtype=torch.uint8), run))
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == {
        p.name: (p.dtype, p.shape) for p in run}
