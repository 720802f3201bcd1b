"""Places for work of which only so much is begun at once, and which nothing that is slow can hold for long."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Places:
    """So many places, each given on after some seconds, also when who had it first is not done."""

    def __init__(self, count: int, seconds: float) -> None:
        self._free = asyncio.Semaphore(count)
        self._seconds = seconds

    @contextlib.asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """One place, for the length of the block at most."""
        await self._free.acquire()
        held = True

        def give_on() -> None:
            nonlocal held
            if held:
                self._free.release()
            held = False

        timer = asyncio.get_running_loop().call_later(self._seconds, give_on)
        try:
            yield
        finally:
            timer.cancel()
            give_on()
