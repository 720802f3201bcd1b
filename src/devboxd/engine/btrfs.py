"""Btrfs by its ioctls: subvolumes and their snapshots. No program is started for any of it."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devboxd.agent.descriptors import filesystem_type
from devboxd.engine import linux

MAGIC = 0x9123683E
_TYPE = 0x94 << 8
_WRITE, _READ_WRITE = 1 << 30, 3 << 30
_ARGS = struct.Struct("=qQQ32s4040s")
_PLAIN_ARGS = struct.Struct("=q4088s")
_SUBVOL_CREATE = _WRITE | _ARGS.size << 16 | _TYPE | 24
_SNAP_CREATE = _WRITE | _ARGS.size << 16 | _TYPE | 23
_SNAP_DESTROY = _WRITE | _PLAIN_ARGS.size << 16 | _TYPE | 15
_INO_LOOKUP = _READ_WRITE | _PLAIN_ARGS.size << 16 | _TYPE | 18
_SEARCH_KEY = struct.Struct("=7Q4I5Q")
"""The tree; from and to: objects, offsets, transactions, types; how many are wanted, or were found; bytes for them."""
_SEARCH = _READ_WRITE | _SEARCH_KEY.size << 16 | _TYPE | 17
_SEARCH_BYTES, _COUNT = 256 << 10, 64
_HEADER = struct.Struct("=3Q2I")
_EXTENT = struct.Struct("<QQBBHB4Q")
"""Its transaction, bytes in memory, compression and other coding, kind; place and length on the disk, part of it."""
_ROOT_TREE, _ROOT_ITEM, _EXTENT_DATA, _INLINE = 1, 132, 108, 0
_LAST_SNAPSHOT = 200
"""Where a subvolume's item says in which transaction a snapshot was made last, of it or as it."""
_FS_INFO = 2 << 30 | 1024 << 16 | _TYPE | 31
_RESIZE = _WRITE | _PLAIN_ARGS.size << 16 | _TYPE | 3
_READ_ONLY = 2
_ROOT_INODE = 256
_SYSFS = Path("/sys/fs/btrfs")


def create(path: Path) -> None:
    """Make an empty subvolume. Raises OSError."""
    with opened(path.parent) as parent:
        linux.ioctl(parent, _SUBVOL_CREATE, _arguments(path.name))


def snapshot(source: Path, target: Path, *, read_only: bool) -> None:
    """Make `target` a copy of the subvolume `source` as it is at one instant. Raises OSError."""
    with opened(source) as origin, opened(target.parent) as parent:
        linux.ioctl(parent, _SNAP_CREATE, _arguments(target.name, origin, _READ_ONLY if read_only else 0))


def delete(path: Path) -> None:
    """Delete a subvolume with all that is in it; none is no error. The room comes back a little later."""
    try:
        with opened(path.parent) as parent:
            linux.ioctl(parent, _SNAP_DESTROY, bytearray(_PLAIN_ARGS.pack(0, os.fsencode(path.name))))
    except FileNotFoundError:
        return


def grow(root: Path) -> None:
    """Use all of the device, which has become larger. Raises OSError."""
    with opened(root) as descriptor:
        linux.ioctl(descriptor, _RESIZE, bytearray(_PLAIN_ARGS.pack(0, b"1:max")))


def is_subvolume(path: Path) -> bool:
    """Whether a path on btrfs is the root of a subvolume."""
    try:
        return path.stat().st_ino == _ROOT_INODE
    except FileNotFoundError:
        return False


def _arguments(name: str, source: int = 0, flags: int = 0) -> bytearray:
    return bytearray(_ARGS.pack(source, 0, flags, b"", os.fsencode(name)))


def holds(folder: Path) -> bool:
    """Whether a folder lies on btrfs."""
    with opened(folder) as descriptor:
        return filesystem_type(descriptor) == MAGIC


def devices(folder: Path) -> set[str]:
    """The numbers, as major:minor, of the devices of the file system of a folder. Raises OSError."""
    with opened(folder) as descriptor:
        return {path.read_text().strip() for path in (_facts(descriptor) / "devices").glob("*/dev")}


def free(root: Path) -> int:
    """Bytes of content that still fit, without what waits to be written or was deleted a moment ago. Raises OSError.

    For a file system on one device.
    """
    with opened(root) as descriptor:
        found, facts = os.fstatvfs(descriptor), _facts(descriptor) / "allocation"

    def number(of: Path, name: str) -> int:
        return int((of / name).read_text())

    kinds = ("data", "metadata", "system")
    unallocated = found.f_blocks * found.f_frsize - sum(number(facts / kind, "disk_total") for kind in kinds)
    data = facts / "data"
    taken = ("used", "reserved", "may_use", "pinned", "readonly")
    return unallocated + number(data, "total_bytes") - sum(number(data, f"bytes_{name}") for name in taken)


def shared(file: Path) -> int:
    """Bytes of a file that need room a second time when they are written over. Raises OSError.

    Those that are older than the last snapshot of the subvolume in which it lies, whether that is there still or not:
    the kernel does not look. What is written while this counts may be counted too.
    """
    with opened(file.parent) as folder:
        tree = bytearray(_PLAIN_ARGS.pack(0, b""))
        struct.pack_into("=Q", tree, 8, _ROOT_INODE)
        linux.ioctl(folder, _INO_LOOKUP, tree)
        (number,) = struct.unpack_from("=Q", tree)
        (root,) = _items(folder, _ROOT_TREE, number, _ROOT_ITEM)
        (last,) = struct.unpack_from("<Q", root, _LAST_SNAPSHOT)
        found = 0
        for item in _items(folder, number, file.stat().st_ino, _EXTENT_DATA) if last else ():
            if item[20] != _INLINE:
                made, *_, place, _, _, length = _EXTENT.unpack_from(item)
                found += length if place and made <= last else 0
    return found


def _items(descriptor: int, tree: int, number: int, kind: int) -> Iterator[memoryview]:
    """The items of one kind that an object has in a tree."""
    start, most = 0, 2**64 - 1
    while start <= most:
        buffer = bytearray(_SEARCH_KEY.size + _SEARCH_BYTES)
        key = (tree, number, number, start, most, 0, most, kind, kind, 2**32 - 1, 0, 0, 0, 0, 0, _SEARCH_BYTES)
        _SEARCH_KEY.pack_into(buffer, 0, *key)
        linux.ioctl(descriptor, _SEARCH, buffer)
        (count,) = struct.unpack_from("=I", buffer, _COUNT)
        if not count:
            return
        content, at = memoryview(buffer), _SEARCH_KEY.size
        for _ in range(count):
            _, _, offset, _, length = _HEADER.unpack_from(content, at)
            at += _HEADER.size
            yield content[at : at + length]
            at += length
        start = offset + 1


def _facts(descriptor: int) -> Path:
    """The folder of what the kernel tells of the file system of an opened folder."""
    buffer = bytearray(1024)
    linux.ioctl(descriptor, _FS_INFO, buffer)
    number = buffer[16:32].hex()
    name = "-".join((number[:8], number[8:12], number[12:16], number[16:20], number[20:]))
    if not (_SYSFS / name).is_dir():
        raise OSError(errno.ENOENT, f"find the file system {name} in {_SYSFS}")
    return _SYSFS / name


@contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A descriptor of a folder for the length of a block. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
