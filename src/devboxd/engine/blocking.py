"""Blocking work in threads that a cancelled caller does not leave behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def finished(work: Callable[[], _T]) -> _T:
    """Run `work` in a thread and never return before it has ended, so that a cancelled caller can clean up after it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # it has been seen: the cancellation is what the caller hears of
        raise
