"""The error of work that nobody waits for is seen."""

from __future__ import annotations

import asyncio

import pytest

from flux_ray.background import in_background

pytestmark = pytest.mark.unit


async def raises() -> None:
    await asyncio.sleep(0)
    raise OSError("nobody waits for me")


async def test_what_it_raises_is_told_and_that_it_was_cancelled_is_not():
    told: list[Exception] = []
    failed, cancelled = in_background(raises(), told.append), in_background(asyncio.sleep(60), told.append)
    cancelled.cancel()
    await asyncio.wait({failed, cancelled})
    assert [str(error) for error in told] == ["nobody waits for me"]
