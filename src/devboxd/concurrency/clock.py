"""The clock by which devboxes live and are idle, as a part of the server: a test has one that it sets."""

from __future__ import annotations

import asyncio
import time

from devboxd.concurrency.waits import wait


class Clock:
    """The clock of the machine."""

    def now_ms(self) -> int:
        """The wall clock, in Unix milliseconds. It may be set, also back."""
        return now_ms()

    def seconds(self) -> float:
        """Seconds since some moment; nobody sets this one."""
        return time.monotonic()

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        """Wait until `event` is set, at most `seconds`; whether it was."""
        return await wait(event, seconds)


def now_ms() -> int:
    """The wall clock, in Unix milliseconds."""
    return time.time_ns() // 1_000_000
