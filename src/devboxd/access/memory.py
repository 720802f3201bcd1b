"""Files of a box that lie in memory, as in /run and /dev/shm: a process in the box's cgroups writes them.

The kernel counts such memory for the cgroup of the process that writes it. Were that the server, a box could have more
than its limit. The process is the first to be killed when the box has no memory left.
"""

from __future__ import annotations

import asyncio
import errno
import os
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from devboxd.engine import linux

_TMPFS, _RAMFS = 0x01021994, 0x858458F6
_ENTER = 'for f in $ENTRANCES; do echo 0 >"$f" || exit 1; done; echo 1000 >/proc/self/oom_score_adj; exec cat'


def in_memory(descriptor: int) -> bool:
    """Whether a file lies in memory. Raises OSError."""
    return linux.file_system_kind(descriptor) in (_TMPFS, _RAMFS)


@asynccontextmanager
async def writer(descriptor: int, entrances: Sequence[Path]) -> AsyncIterator[int]:
    """The end of a pipe, which does not block, for the length of a block; then all is in the file.

    `entrances`: the files by which a process enters the box's cgroups. Raises OSError ENOSPC when there was no memory
    or no room.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(writing, False)
        environment = {"PATH": os.defpath, "ENTRANCES": " ".join(map(str, entrances))}
        process = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", _ENTER, stdin=reading, stdout=descriptor, stderr=DEVNULL, env=environment
        )
    except BaseException:
        os.close(writing)
        raise
    finally:
        os.close(reading)
    try:
        try:
            yield writing
        finally:
            os.close(writing)
        await _ended_well(process)
    except BrokenPipeError:
        await _ended_well(process)
        raise
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _ended_well(process: Process) -> None:
    if await process.wait():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
