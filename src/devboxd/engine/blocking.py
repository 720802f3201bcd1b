"""Blocking work in threads that a cancelled caller does not leave behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


async def finished(work: Callable[[], _T]) -> _T:
    """Run `work` in a thread and never return before it has ended, so that a cancelled caller can clean up after it."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await ended(task)
        raise


async def ended(work: asyncio.Future[Any]) -> None:
    """Return when it has ended, however, and not before: also when the caller is cancelled, which is on its way out."""
    while not work.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({work})
    if not work.cancelled():
        work.exception()  # it has been seen: what ends the caller is what others hear of
