"""Disks that wait for the next box: the kernel ends a transaction of the pool for each that is new, which takes longer
than all the rest of a box, so it is done before somebody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import structlog

from devboxd.concurrency.threads import finished
from devboxd.engine.base import EngineError
from devboxd.engine.disks import Disks

_log = structlog.get_logger(__name__)
_MOST = 8
_REST_S = 0.05


class Spares:
    """One copy of each of the snapshots from which boxes began last, and empty disks of the size that the last had."""

    def __init__(self, disks: Disks) -> None:
        self._disks = disks
        self._used: dict[str, None] = {}
        self._size = 0
        self._wanted = asyncio.Event()

    def used(self, snapshot_id: str | None, size: int) -> None:
        """A box began from this snapshot, or with an empty disk of this size; another one may follow."""
        if snapshot_id is None:
            self._size = size
        else:
            self._used.pop(snapshot_id, None)
            self._used[snapshot_id] = None
        self._wanted.set()

    async def keep(self) -> None:
        """Make what is missing and delete what nobody used lately, without end."""
        while True:
            await self._wanted.wait()
            # Not a wait for something: who began a box has the disk for itself meanwhile.
            await asyncio.sleep(_REST_S)
            self._wanted.clear()
            if self._size:
                await self._do(partial(self._disks.stock, self._size))
            while len(self._used) > _MOST:
                oldest = next(iter(self._used))
                del self._used[oldest]
                await self._do(partial(self._disks.forget_spare, oldest))
            for snapshot_id in reversed(tuple(self._used)):
                await self._do(partial(self._disks.spare, snapshot_id))

    async def _do(self, work: Callable[[], None]) -> None:
        try:
            await finished(work)
        except (EngineError, OSError) as error:
            _log.warning("cannot keep disks ready", error=str(error))
