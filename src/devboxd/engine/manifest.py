"""One number for all that a disk holds, so that anybody can see whether it is still the same."""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE, Process
from pathlib import Path

from devboxd.engine.base import EngineError

_SAID = 4096
_ARCHIVE = (
    *("nice", "tar", "--create", "--file=-", "--sort=name", "--numeric-owner", "--sparse", "--sparse-version=0.0"),
    *(
        "--format=pax",
        "--pax-option=exthdr.name=%d/%f,delete=atime,delete=ctime",
        "--xattrs",
        "--xattrs-include=*",
        "--warning=none",
    ),
)
"""Of the same files always the same bytes: holes and order do not count, nor when a file was read."""


async def digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, over names, kinds, owners, modes, times, attributes and contents below a folder.

    Nothing in it is followed or opened but plain files; sockets do not count. Raises EngineError.
    """
    reading, writing = os.pipe()
    running: list[Process] = []
    try:
        try:
            running.append(
                await asyncio.create_subprocess_exec(
                    *_ARCHIVE, "--directory", folder, ".", stdin=DEVNULL, stdout=writing, stderr=PIPE
                )
            )
            running.append(await asyncio.create_subprocess_exec("nice", "sha256sum", stdin=reading, stdout=PIPE))
        finally:
            os.close(reading)
            os.close(writing)
        archive, hashed = running
        said, (found, _), _ = await asyncio.gather(_end_of(archive), hashed.communicate(), archive.wait())
    except OSError as error:
        raise EngineError(f"cannot read {folder} as a whole: {error}; tar and sha256sum are needed") from error
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if any(process.returncode for process in running):
        words = said.decode(errors="replace").strip().splitlines() or ["no reason was given"]
        raise EngineError(f"cannot read {folder} as a whole: {words[-1]}")
    return found.split()[0].decode()


async def _end_of(process: Process) -> bytes:
    """The end of what a process says: it quotes names that a box has chosen, as many as the box likes."""
    end = b""
    while process.stderr is not None and (more := await process.stderr.read(_SAID)):
        end = (end + more)[-_SAID:]
    return end
