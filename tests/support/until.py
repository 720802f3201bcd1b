"""Waits for what nothing tells and only looking shows: the end of another program's work, a line in a log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_LOOK_S = 0.02


def until(look: Callable[[], T], what: str = "it does not come about", seconds: float = 60) -> T:
    """The first true answer of `look`. Fails with `what` after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        time.sleep(_LOOK_S)
    return found


async def eventually(look: Callable[[], T], what: str = "it does not come about", seconds: float = 60) -> T:
    """As `until`, beside other tasks."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {what}"
        await asyncio.sleep(_LOOK_S)
    return found
