"""What a child prints, on its way to this process's own output.

Takes:  the pipe into which the child prints.
Gives:  `Output`: passes on so many bytes of each call; the rest is counted.
Never:  lets a child wait: what isn't passed on is read all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from multiprocessing.connection import Connection

STDOUT = 1
CHUNK_BYTES = 1 << 16
MOST_LAST_BYTES = 1 << 20  # that are read of a child that has ended


class Output(asyncio.Protocol):
    def __init__(self, most_bytes: int | None) -> None:
        self._most_bytes, self._num_bytes = most_bytes, 0
        self._transport: asyncio.ReadTransport | None = None
        self._descriptor = -1

    @classmethod
    async def of(cls, pipe: Connection, *, most_bytes: int | None) -> Output:
        """The pipe is closed with the Output."""
        file = os.fdopen(os.dup(pipe.fileno()), "rb", 0)
        pipe.close()
        transport, output = await asyncio.get_running_loop().connect_read_pipe(lambda: cls(most_bytes), file)
        output._transport, output._descriptor = transport, file.fileno()
        return output

    def begin_call(self) -> None:
        self._num_bytes = 0

    def data_received(self, data: bytes) -> None:
        before, self._num_bytes = self._num_bytes, self._num_bytes + len(data)
        if self._most_bytes is None or self._num_bytes <= self._most_bytes:
            return _write(data)
        if before <= self._most_bytes:
            _write(data[: self._most_bytes - before])
            logging.getLogger(__name__).warning(
                "a call printed more than %d bytes: the rest of them is left out", self._most_bytes)

    def close(self) -> None:
        """Reads what the child had still printed."""
        assert self._transport is not None
        if self._transport.is_closing():
            return
        with contextlib.suppress(OSError):  # nothing is left
            for _ in range(MOST_LAST_BYTES // CHUNK_BYTES):
                data = os.read(self._descriptor, CHUNK_BYTES)
                if not data:
                    break
                self.data_received(data)
        self._transport.close()


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError):  # whoever reads it has gone
        os.write(STDOUT, data)
