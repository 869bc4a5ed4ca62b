"""The log-prob and entropy path stays within 1.2 x hidden states + 3 fp32 chunks of logits, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.model.head_memory import Shape, peak_extra_bytes

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("shape", [
    Shape(tokens=1024, hidden=64, vocabulary=4096, chunk=128),
    Shape(tokens=2048, hidden=512, vocabulary=512, chunk=64),
    Shape(tokens=1024, hidden=64, vocabulary=4096, chunk=128, dtype=torch.bfloat16),
])
def test_extra_peak_is_bounded(shape: Shape) -> None:
    extra = peak_extra_bytes(shape)
    assert extra < shape.bound_bytes
    assert extra > shape.chunk * shape.vocabulary * 4  # the meter does see a chunk of logits


def test_the_meter_sees_whole_logits() -> None:
    whole = Shape(tokens=1024, hidden=64, vocabulary=4096, chunk=1024)
    assert peak_extra_bytes(whole) > Shape(tokens=1024, hidden=64, vocabulary=4096, chunk=128).bound_bytes
