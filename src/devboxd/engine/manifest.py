"""All that a disk holds as one stream of bytes: its digest, so that anybody can see whether it is still the same, and
archives of it, from which it comes back.

Of the same files they are always the same bytes: holes and order do not count, nor when a file was read.
"""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from pathlib import Path

from devboxd.engine.base import EngineError

_SAID = 4096
_ATTRIBUTES = ("--xattrs", "--xattrs-include=*", "--numeric-owner", "--warning=none")
_ARCHIVE = (
    *("nice", "tar", "--create", "--file=-", "--sort=name", "--sparse", "--sparse-version=0.0"),
    *("--format=pax", "--pax-option=exthdr.name=%d/%f,delete=atime,delete=ctime", *_ATTRIBUTES),
)
_HASH = ("nice", "sha256sum")


async def digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, over names, kinds, owners, modes, times, attributes and contents below a folder.

    Nothing in it is followed or opened but plain files; sockets do not count. Raises EngineError.
    """
    return _sum(await _piped(_packing(folder), _HASH, what=f"read {folder} as a whole"))


async def archive(folder: Path, target: Path) -> str:
    """Write all that is below a folder into a file; the digest of both. Raises EngineError."""
    copying = ("tee", "--", str(target))
    return _sum(await _piped(_packing(folder), copying, _HASH, what=f"keep {folder} in {target}"))


async def extract(source: Path, folder: Path) -> None:
    """Fill a new folder with all that is in an archive. Raises EngineError, also for names too long for this way."""
    unpacking = ("tar", "--extract", "--preserve-permissions", "--same-owner", *_ATTRIBUTES, f"--directory={folder}")
    await _piped((*unpacking, f"--file={source}"), what=f"bring back {folder}")


async def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises EngineError."""
    return _sum(await _piped((*_HASH, "--", str(file)), what=f"read {file}"))


def _packing(folder: Path) -> Sequence[str]:
    return (*_ARCHIVE, f"--directory={folder}", ".")


def _sum(output: bytes) -> str:
    return output.split()[0].removeprefix(b"\\").decode()  # what it puts before names with odd characters


async def _piped(*commands: Sequence[str], what: str) -> bytes:
    """Run programs, each of which reads what the one before writes; what the last one writes. Raises EngineError."""
    running: list[Process] = []
    above: int = DEVNULL
    try:
        try:
            for number, command in enumerate(commands):
                reading, writing = (DEVNULL, PIPE) if number == len(commands) - 1 else os.pipe()
                try:
                    running.append(
                        await asyncio.create_subprocess_exec(*command, stdin=above, stdout=writing, stderr=PIPE)
                    )
                finally:
                    _close(above, writing)
                    above = reading
        finally:
            _close(above)
        output = running[-1].stdout
        found, *said = await asyncio.gather(output.read() if output else _nothing(), *map(_end_of, running))
        await asyncio.gather(*(process.wait() for process in running))
    except OSError as error:
        raise EngineError(f"cannot {what}: {error}; {', '.join(c[0] for c in commands)} are needed") from error
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if any(process.returncode for process in running):
        words = [line for text in said for line in text.decode(errors="replace").strip().splitlines()[-1:]]
        raise EngineError(f"cannot {what}: {'; '.join(words) or 'no reason was given'}")
    return found


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


async def _nothing() -> bytes:
    return b""


async def _end_of(process: Process) -> bytes:
    """The end of what a process says: it quotes names that a box has chosen, as many as the box likes."""
    end = b""
    while process.stderr is not None and (more := await process.stderr.read(_SAID)):
        end = (end + more)[-_SAID:]
    return end
