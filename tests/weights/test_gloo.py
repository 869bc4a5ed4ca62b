"""The sender's end of the gloo transfer: whom it names where an update fails."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.system  # vLLM's import takes seconds


def test_an_engine_that_gave_up_is_named_and_not_the_send_that_then_found_nobody(monkeypatch):
    from flux_ray.weights import gloo

    told = threading.Event()

    class Client:
        def start_weight_update(self):
            pass

        def update_weights(self, update_info):
            told.set()
            raise ValueError("engine 0, update_weights: no layer of that name")

    def finds_nobody(*_):
        assert told.wait(10)
        time.sleep(0.1)
        raise RuntimeError("Timed out waiting 120000ms for send operation to complete")

    info = gloo.GlooTrainerInitInfo("127.0.0.1", 2, 64, 1.0, rank=0)
    source = SimpleNamespace(metadata=list)
    engine = gloo.GlooTrainerWeightTransferEngine(client=Client(), source=source, init_info=info)
    monkeypatch.setattr(engine, "_send", finds_nobody)
    with pytest.raises(ValueError, match="no layer of that name"):
        engine.send_weights()
