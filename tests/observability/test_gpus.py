"""What nvidia-smi says becomes metrics. A program of that name stands in for it: no GPU is needed."""

from __future__ import annotations

import asyncio

import pytest

from flux_ray.observability import gpus
from flux_ray.observability.gpus import Gpus

pytestmark = pytest.mark.unit

DEADLINE_S = 30.0


def nvidia_smi(tmp_path, monkeypatch, body: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


async def test_the_mean_of_utilisation_and_the_most_memory_since_the_last_step(tmp_path, monkeypatch):
    nvidia_smi(tmp_path, monkeypatch, "echo '80, 2048'; echo '20, 10240'")
    several = Gpus()
    watching = asyncio.create_task(several.watch())
    async with asyncio.timeout(DEADLINE_S):
        while not several._answers:  # noqa: ASYNC110 it sets no event
            await asyncio.sleep(0.01)
    assert several.step_metrics() == {"gpu/utilisation": 0.5, "gpu/memory_gib": 10.0}
    assert several.step_metrics() == {}
    watching.cancel()
    await asyncio.wait({watching})


@pytest.mark.parametrize("body", ["exit 9", "echo '[N/A], 3'", "sleep 30"])
async def test_one_that_fails_or_hangs_is_asked_no_more(tmp_path, monkeypatch, body):
    monkeypatch.setattr(gpus, "DEADLINE_S", 0.5)
    nvidia_smi(tmp_path, monkeypatch, body)
    several = Gpus()
    async with asyncio.timeout(DEADLINE_S):
        await several.watch()
    assert several.step_metrics() == {}


async def test_a_machine_without_one(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    several = Gpus()
    await several.watch()
    assert several.step_metrics() == {}
