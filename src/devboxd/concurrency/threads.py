"""Blocking work in threads that a cancelled caller does not leave behind, and waits without any."""

from __future__ import annotations

import asyncio
import contextlib
import threading
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


async def readable(descriptor: int) -> None:
    """Return when there is something to be read from a descriptor, or its end."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(descriptor)


async def in_own_thread(work: Callable[[], None]) -> None:
    """Run `work` in a new thread that ends with it, and never return before, so that a cancelled caller can clean up.

    Threads of a pool would not do: the namespace and cgroup that `work` enters would stick to them.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            loop.call_soon_threadsafe(done.set_exception, error)
        else:
            loop.call_soon_threadsafe(done.set_result, None)

    threading.Thread(target=run, name="start").start()
    try:
        await asyncio.shield(done)
    except asyncio.CancelledError:
        await ended(done)
        raise
