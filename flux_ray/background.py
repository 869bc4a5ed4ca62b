"""Work that nobody waits for.

Gives:  `in_background`: a task whose error is seen.
Knows:  asyncio tells of such an error only when the task is collected, which may be never.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine


def in_background(
    work: Coroutine[object, object, None], on_error: Callable[[Exception], object],
) -> asyncio.Task[None]:
    """A task; `on_error` gets what the work raises, unless it is cancelled."""
    def ended(task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            on_error(error)

    task = asyncio.create_task(work)
    task.add_done_callback(ended)
    return task
