"""What the server does about storage all the time: room ahead of need, and a look whether it works at all."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from functools import partial

import structlog

from devboxd.concurrency.threads import finished
from devboxd.engine.disks import Disks
from devboxd.engine.fallback import Fallback
from devboxd.engine.pool import Pool
from devboxd.engine.reserve import Reserve

_log = structlog.get_logger(__name__)
_TEND_S = 0.5
_TEND_SCARCE_S = 0.1
"""Before a disk that begins to be written at 2 GB/s has used up what each may take unseen."""
_TRIM_S = 5.0
_TRIM_SCARCE_S = 1.0
_SLICE = 1 << 30


class Upkeep:
    """The upkeep of one pool and of the disk below it. `trouble`: why nothing can be written to the pool, as last seen.

    `leaving`: programs that write back disks of boxes that have ended.
    """

    def __init__(
        self, pool: Pool, disks: Disks, reserve: Reserve, fallback: Fallback, note_failure: Callable[[bool], None]
    ) -> None:
        self._pool = pool
        self._disks = disks
        self._reserve = reserve
        self._fallback = fallback
        self._note_failure = note_failure
        self.trouble: str | None = None
        self.leaving: list[subprocess.Popen[bytes]] = []

    @property
    def full(self) -> bool:
        """Whether the pool had no more room for what boxes write when it was last looked at."""
        return self._pool.copies and self._disks.credits.exhausted

    @property
    def _scarce(self) -> bool:
        """Whether not every disk may take all that its size says."""
        return self._disks.credits.level is not None

    async def tend(self) -> None:
        """Let the pool grow before it is full, and renew what each disk may take of it, without end."""
        if self._pool.copies:
            self._disks.credits.fallback = self._fallback
        while True:
            await self._tend()
            self.leaving = [process for process in self.leaving if process.poll() is None]
            await asyncio.sleep(_TEND_SCARCE_S if self._scarce else _TEND_S)

    async def _tend(self) -> None:
        trouble, full = await finished(self._pool.trouble), self.full
        if trouble != self.trouble:
            self.trouble = trouble
            self._note_failure(trouble is not None)
            if trouble:
                _log.error("the storage cannot be written; restart the server to recover it", reason=trouble)
            else:
                _log.info("the storage can be written again")
        if trouble:
            return
        try:
            await finished(self._reserve.tend)
            await finished(self._pool.fill)
            if self._pool.copies:
                await finished(self._disks.credits.renew)
        except OSError as error:
            _log.error("storage cannot be kept up", error=str(error))
        if full is not self.full:
            words = (
                "is full: boxes cannot write until there is room" if self.full else "has room: boxes can write again"
            )
            _log.warning(f"the storage {words}")

    async def trim(self) -> None:
        """Give the room of deleted files back to the pool, disk after disk, in slices, without end.

        Not by the kernel at each deletion: a box that deletes much would hold up the others.
        """
        while True:
            scarce = self._scarce
            await asyncio.sleep(_TRIM_SCARCE_S if scarce else _TRIM_S)
            if self.trouble is None:
                for box_id, size in await finished(self._disks.garbage):
                    for start in range(0, size, _SLICE):
                        await finished(partial(self._disks.trim, box_id, start, _SLICE))
                if scarce:
                    await finished(self._pool.commit)
