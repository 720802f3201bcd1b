"""Loop devices: disks that are files. The kernel takes one away with its last user, also when a program dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

_GET_FREE, _CONFIGURE, _SET_CAPACITY, _GET_STATUS = 0x4C82, 0x4C0A, 0x4C07, 0x4C05
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_INFO_BYTES = 232
_TRIES = 64
_CONTROL = Path("/dev/loop-control")
_making = threading.Lock()
"""Whoever asks for a free device gets the one that others got who have not taken it yet."""


def available() -> bool:
    """Whether the kernel offers loop devices."""
    return _CONTROL.exists()


def shown(file: Path) -> bool:
    """Whether anybody has a file attached."""
    found = _open_existing(file, None)
    if found:
        os.close(found[1])
    return found is not None


@contextlib.contextmanager
def attached(file: Path, *, new: bool = False, known: str | None = None, read_only: bool = False) -> Iterator[str]:
    """The path of the device of a file: the one that there is, for two on one file would destroy it, or a new one.

    It lasts as long as the block or another user. `new`: nobody else can have attached the file; `known`: the device
    that it had last. Who attaches the same file at the same time must be kept out by the caller. Raises OSError.
    """
    with contextlib.ExitStack() as opened:
        there = None if new else _open_existing(file, known)
        path, device = there or _make(file, read_only)
        opened.callback(os.close, device)
        yield path


def grow(path: str) -> None:
    """Show all of a file that has become larger, by the path of its device. Raises OSError."""
    device = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _SET_CAPACITY)
    finally:
        os.close(device)


def devices() -> list[tuple[str, str]]:
    """All devices in use: the name of each, and the last two parts of the path of its file.

    The others depend on whether what the file lies on is still mounted.
    """
    found = []
    for name in os.listdir("/sys/block"):
        if name.startswith("loop"):
            with contextlib.suppress(OSError):
                file = Path("/sys/block", name, "loop/backing_file").read_text().rstrip("\n")
                found.append((name, "/".join(file.split("/")[-2:])))
    return found


def _candidates(file: Path, known: str | None) -> Iterator[str]:
    if known:
        yield known
    end = "/".join(file.parts[-2:])
    yield from (name for name, last in devices() if last == end)


def _open_existing(file: Path, known: str | None) -> tuple[str, int] | None:
    """The path and an opened descriptor of the device that shows a file: while it is open the kernel keeps it."""
    found = os.stat(file)
    for name in _candidates(file, known):
        with contextlib.suppress(OSError):
            device = os.open(_node(name), os.O_RDONLY | os.O_CLOEXEC)
            if _is(device, found):
                return str(_node(name)), device
            os.close(device)
    return None


def _is(device: int, file: os.stat_result) -> bool:
    info = bytearray(_INFO_BYTES)
    try:
        fcntl.ioctl(device, _GET_STATUS, info)
    except OSError:
        return False
    return struct.unpack_from("=2Q", info) == (file.st_dev, file.st_ino)


def _make(file: Path, read_only: bool) -> tuple[str, int]:
    access = os.O_RDONLY if read_only else os.O_RDWR
    for attempt in range(_TRIES):
        with _making, contextlib.ExitStack() as cleanup:
            with _CONTROL.open("rb") as control:
                number = fcntl.ioctl(control, _GET_FREE)
            path = _node(f"loop{number}")
            device = os.open(path, access | os.O_CLOEXEC)
            cleanup.callback(os.close, device)
            try:
                _configure(device, file, access, _READ_ONLY if read_only else 0)
            except OSError as error:
                if error.errno == errno.EBUSY and attempt < _TRIES - 1:  # another program was faster
                    continue
                raise
            cleanup.pop_all()
            return str(path), device
    raise OSError(errno.EBUSY, "find a free loop device")


def _configure(device: int, file: Path, access: int, flags: int) -> None:
    """With direct I/O where the file system below can: else all is kept in memory twice."""
    backing = os.open(file, access | os.O_CLOEXEC)
    try:
        for block, direct in ((4096, _DIRECT_IO), (0, 0)):
            # struct loop_config: the file, the block size, struct loop_info64 of which only the flags matter
            info = struct.pack("=5Q4I", 0, 0, 0, 0, 0, 0, 0, 0, flags | _AUTOCLEAR | direct) + bytes(176)
            try:
                fcntl.ioctl(device, _CONFIGURE, bytearray(struct.pack("=II", backing, block) + info + bytes(64)))
            except OSError as error:
                if error.errno == errno.EINVAL and direct:
                    continue
                raise
            return
    finally:
        os.close(backing)


def _node(name: str) -> Path:
    """The device file of a loop device; containers often lack it."""
    path = Path("/dev", name)
    if not path.exists() and (number := re.fullmatch(r"loop(\d+)", name)):
        with contextlib.suppress(FileExistsError):
            os.mknod(path, 0o600 | stat.S_IFBLK, os.makedev(7, int(number[1])))
    return path
