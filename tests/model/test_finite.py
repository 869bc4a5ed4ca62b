"""Numbers that are not finite are found, wherever they are; large ones are none of them."""

from __future__ import annotations

import math

import pytest
import torch

from flux_ray.model.finite import not_finite

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_of_many(dtype, value):
    wrong = torch.ones(7, 11, dtype=dtype)
    wrong[3, 5] = value
    assert not_finite([torch.ones(3, dtype=dtype), wrong, torch.zeros(0, dtype=dtype)]) == [1]


def test_infinities_do_not_hide_one_another():
    assert not_finite([torch.tensor([math.inf, 1.0, -math.inf])]) == [0]


def test_large_values_whose_sum_overflows_are_finite():
    assert not_finite([torch.full((1000,), 3e38), torch.full((3,), 1e300, dtype=torch.float64)]) == []


def test_nothing():
    assert not_finite([]) == []
