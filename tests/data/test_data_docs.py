import doctest

import pytest

from flux_ray.data import order, pairs, rows

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("module", [order, pairs, rows])
def test_the_examples_in_docstrings_hold(module):
    tried = doctest.testmod(module)
    assert tried.attempted and not tried.failed
