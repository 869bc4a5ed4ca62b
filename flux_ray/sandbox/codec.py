"""Values that travel between a process and its child, as bytes.

Takes:  None, booleans, numbers, texts, bytes, lists, dicts, NumPy arrays, dates and decimals, nested as they like.
Gives:  `encode`, `decode`; tuples come back as lists.
Never:  runs what it decodes: a child can't make its parent do anything by what it sends.
"""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

ARRAY = 1  # msgpack's number of an extension
#: Type ► its extension's number, to text, and from it.
AS_TEXT: dict[type, tuple[int, Callable[[Any], str], Callable[[str], Any]]] = {
    datetime.datetime: (2, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    datetime.date: (3, datetime.date.isoformat, datetime.date.fromisoformat),
    datetime.time: (4, datetime.time.isoformat, datetime.time.fromisoformat),
    decimal.Decimal: (5, str, decimal.Decimal),
    int: (6, str, int),  # beyond 64 bits
}
FROM_TEXT = {number: read for number, _, read in AS_TEXT.values()}


def encode(value: object) -> bytes:
    """Raises TypeError, naming the type, for what can't travel."""
    return msgpack.packb(value, default=_special, strict_types=False)


def decode(data: bytes) -> Any:
    return msgpack.unpackb(data, ext_hook=_from_special, strict_map_key=False)


def _special(value: object) -> object:
    if isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            return value.tolist()
        array = np.ascontiguousarray(value)
        return msgpack.ExtType(ARRAY, msgpack.packb([array.dtype.str, value.shape, array.tobytes()]))
    if isinstance(value, np.generic):
        return value.item()
    for kind, (number, write, _) in AS_TEXT.items():
        if isinstance(value, kind):
            return msgpack.ExtType(number, write(value).encode())
    raise TypeError(f"a value of type {type(value).__name__} can't be given to another process")


def _from_special(number: int, data: bytes) -> object:
    if number == ARRAY:
        dtype, shape, raw = msgpack.unpackb(data)
        return np.frombuffer(raw, np.dtype(dtype)).reshape(shape).copy()  # a copy can be written to
    return FROM_TEXT[number](data.decode())
