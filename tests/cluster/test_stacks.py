"""Where a process stands is written down, from a thread and within seconds."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time

import pytest

from flux_ray.cluster.stacks import write_stacks

pytestmark = pytest.mark.unit

STANDS_STILL = """
import time
def stands_here():
    print("there", flush=True)
    time.sleep(60)
stands_here()
"""


@pytest.fixture
def standing(tmp_path):
    """A process whose output goes to this file, as an actor's does."""
    file = tmp_path / "engine-0.log"
    with file.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", STANDS_STILL, "ray::Host"], stdout=output)
    try:
        end_s = time.monotonic() + 20
        while not file.read_text() and time.monotonic() < end_s:
            time.sleep(0.01)
        yield file, process.pid
    finally:
        process.kill()
        process.wait(10)


async def test_the_stack_of_who_writes_to_a_file(standing, caplog):
    file, pid = standing
    with caplog.at_level(logging.ERROR):
        await asyncio.to_thread(write_stacks, [file])
    (record,) = caplog.records
    text = record.getMessage()
    assert text.startswith(f"where process {pid} ")
    assert "stands_here" in text or "Permission" in text, text  # a machine may forbid to look into a process


async def test_nothing_is_written_of_files_that_nobody_writes_to(tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        await asyncio.to_thread(write_stacks, [tmp_path / "rollout-0.log"])
    assert not caplog.records
