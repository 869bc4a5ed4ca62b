"""What travels between a process and its child comes back as it was."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
import pytest

from flux_ray.sandbox.codec import decode, encode

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("value", [
    None, True, 3, -2**70, 0.5, "é", b"\x00", [1, ["a"]], {"a": {1: [None]}}, datetime.date(2026, 1, 2),
    datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC), datetime.time(1, 2), decimal.Decimal("0.10"),
])
def test_values_come_back_as_they_were(value):
    back = decode(encode(value))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize("array", [np.arange(6, dtype=np.int32).reshape(2, 3), np.zeros(0, np.float32),
                                   np.array([True, False]), np.arange(8)[::2]])
def test_arrays_come_back_with_their_type_and_shape_and_may_be_written_to(array):
    back = decode(encode({"a": array}))["a"]
    np.testing.assert_array_equal(back, array)
    assert back.dtype == array.dtype and back.shape == array.shape and back.flags.writeable


def test_what_cannot_travel_is_named():
    with pytest.raises(TypeError, match="a value of type object can't be given to another process"):
        encode({"column": object()})
