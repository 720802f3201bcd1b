"""Flags of files and folders, where their file system has them."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

_GET = 0x80086601
_SET = 0x40086602
_APPEND = 0x20
_TOP = 0x20000


def append_only(descriptor: int, on: bool) -> None:
    """Let a file only grow, or lift that; `devboxd doctor` says where the file system knows no such thing."""
    _flag(descriptor, _APPEND, on)


def spread(folder: Path) -> None:
    """Let ext4 place each folder in this one into a part of the disk of its own.

    Where many files were deleted in the last minutes, making one takes milliseconds: it looks at each of them. So what
    is made all the time must not lie where the disks of boxes are deleted.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _flag(descriptor, _TOP, True)
    finally:
        os.close(descriptor)


def _flag(descriptor: int, flag: int, on: bool) -> None:
    buffer = bytearray(8)
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, _GET, buffer)
        flags = int.from_bytes(buffer, "little")
        wanted = flags | flag if on else flags & ~flag
        if wanted != flags:
            fcntl.ioctl(descriptor, _SET, wanted.to_bytes(8, "little"))
