"""Changes that must be stored: repeated for as long as the store cannot be written, a full disk for example."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from devboxd.store.db import StoreError

_T = TypeVar("_T")
_log = structlog.get_logger()
_AGAIN_S = 1.0


async def retry_until_stored(change: Callable[[], Awaitable[_T]], what: str) -> _T:
    """The result of `change`, begun again each second while it raises StoreError; `what` it changes, for the log."""
    while True:
        try:
            return await change()
        except StoreError as full:
            _log.error("cannot store a change; trying again", what=what, error=str(full))
            await asyncio.sleep(_AGAIN_S)
