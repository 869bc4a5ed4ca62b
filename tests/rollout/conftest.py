"""One real engine for all tests of the rollout folder and of the wire."""

import os
from types import SimpleNamespace

import pytest_asyncio

from flux_ray.config import from_dict
from flux_ray.rollout.engine import engine_env
from flux_ray.rollout.local import LocalEngine
from tests.tiny import tiny_model

TEMPERATURE = 0.7  # not 1: raw and processed log-probs differ


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def served(tmp_path_factory):
    """The engine and where its model lies. Tied embeddings: the case in which an update can miss the LM head."""
    path = tiny_model(tmp_path_factory.mktemp("engine") / "model", tied=True)
    config = from_dict({"model.path": str(path), "rollout.temperature": TEMPERATURE, "rollout.max_tokens": 48,
                        "rollout.max_num_seqs": 64, "driver.max_staleness": 1, "weights.deadline_s": 60.0})
    os.environ.update(engine_env("cpu", config.rollout))
    engine = LocalEngine(config, index=0, device="cpu", dtype="float32", weights_backend="gloo")
    await engine.start()
    try:
        yield SimpleNamespace(engine=engine, path=path, config=config)
    finally:
        await engine.close()
