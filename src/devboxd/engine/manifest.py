"""All that a disk holds as one stream of bytes: its digest, so that anybody can see whether it is still the same, and
archives of it, from which it comes back.

Of the same files they are always the same bytes: holes and order do not count, nor when a file was read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from devboxd.engine import packing, unpacking
from devboxd.engine.processes import piped

_PROGRAM = (sys.executable, "-I", "-m")
_HASH = ("sha256sum",)


async def digest(folder: Path) -> str:
    """SHA-256, in hexadecimal, over names, kinds, owners, modes, times, attributes and contents below a folder.

    Nothing in it is followed or opened but plain files; sockets do not count. Raises EngineError.
    """
    return _sum(await piped(_packing(folder), _HASH, what=f"read {folder} as a whole"))


async def archive(folder: Path, target: Path) -> str:
    """Write all that is below a folder into a file; the digest of both. Raises EngineError."""
    copying = ("tee", "--", str(target))
    return _sum(await piped(_packing(folder), copying, _HASH, what=f"keep {folder} in {target}"))


async def extract(source: Path, folder: Path) -> None:
    """Fill a new folder with all that is in an archive, also one that GNU tar wrote. Raises EngineError."""
    command = (*_PROGRAM, unpacking.__name__, str(source), str(folder))
    await piped(command, what=f"bring back {folder}")


async def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises EngineError."""
    return _sum(await piped((*_HASH, "--", str(file)), what=f"read {file}"))


def _packing(folder: Path) -> Sequence[str]:
    return (*_PROGRAM, packing.__name__, str(folder))


def _sum(output: bytes) -> str:
    return output.split()[0].removeprefix(b"\\").decode()  # what it puts before names with odd characters
