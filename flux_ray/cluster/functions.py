"""Turns functions that no other process can import (a notebook's, a closure) into bytes, and back.

Gives:  `pack`, `unpack`.
Knows:  Ray's own serialisation, by which its tasks travel. The bytes go between the processes of one run only.
Never:  reads what a file holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flux_ray.errors import UserError


def pack(function: Callable[..., object], *, name: str) -> bytes:
    """UserError where what the function closes over can't travel."""
    from ray import cloudpickle  # seconds to import

    try:
        return cloudpickle.dumps(function)
    except Exception as error:  # whatever its values raise
        raise UserError(f"{name}: the function can't be given to other processes, for what it holds can't: "
                        f"{type(error).__name__}: {error}. Put it at the top of a file of its own") from error


def unpack(data: bytes) -> Callable[..., Any]:
    from ray import cloudpickle

    return cloudpickle.loads(data)
