"""Btrfs by its ioctls: subvolumes, their snapshots, the limit of each. No program is started for any of it."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devboxd.agent.descriptors import filesystem_type

MAGIC = 0x9123683E
_TYPE = 0x94 << 8
_WRITE, _READ_WRITE = 1 << 30, 3 << 30
_ARGS = struct.Struct("=qQQ32s4040s")
_PLAIN_ARGS = struct.Struct("=q4088s")
_SUBVOL_CREATE = _WRITE | _ARGS.size << 16 | _TYPE | 24
_SNAP_CREATE = _WRITE | _ARGS.size << 16 | _TYPE | 23
_SNAP_DESTROY = _WRITE | _PLAIN_ARGS.size << 16 | _TYPE | 15
_RESIZE = _WRITE | _PLAIN_ARGS.size << 16 | _TYPE | 3
_QUOTA_CTL = _READ_WRITE | 16 << 16 | _TYPE | 40
_QUOTA_RESCAN_WAIT = _TYPE | 46
_QGROUP_LIMIT = 2 << 30 | 48 << 16 | _TYPE | 43
_SYNC = _TYPE | 8
_INO_LOOKUP = _READ_WRITE | 4096 << 16 | _TYPE | 18
_QUOTA_ENABLE, _LIMIT_REFERENCED, _LIMIT_EXCLUSIVE, _READ_ONLY = 1, 1, 2, 2
_NO_LIMIT = (1 << 64) - 1
_ROOT_INODE = 256
_NO_SKIP = "8"
"""Deleting a deep tree shall be counted in full: the alternative leaves all limits wrong until a scan."""
_SYSFS = Path("/sys/fs/btrfs")


def create(path: Path) -> None:
    """Make an empty subvolume. Raises OSError."""
    with _opened(path.parent) as parent:
        fcntl.ioctl(parent, _SUBVOL_CREATE, _arguments(path.name))


def snapshot(source: Path, target: Path, *, read_only: bool) -> None:
    """Make `target` a copy of the subvolume `source` as it is at one instant. Raises OSError."""
    with _opened(source) as origin, _opened(target.parent) as parent:
        fcntl.ioctl(parent, _SNAP_CREATE, _arguments(target.name, origin, _READ_ONLY if read_only else 0))


def delete(path: Path) -> None:
    """Delete a subvolume with all that is in it; none is no error. The room comes back a little later."""
    try:
        with _opened(path.parent) as parent:
            fcntl.ioctl(parent, _SNAP_DESTROY, bytearray(_PLAIN_ARGS.pack(0, os.fsencode(path.name))))
    except FileNotFoundError:
        return


def enable_quotas(root: Path) -> None:
    """Count what each subvolume refers to from now on, so that it can be bounded; harmless when that is on."""
    with _opened(root) as descriptor:
        if not (_groups(descriptor) / "enabled").exists():
            fcntl.ioctl(descriptor, _QUOTA_CTL, bytearray(struct.pack("=QQ", _QUOTA_ENABLE, 0)))
            fcntl.ioctl(descriptor, _QUOTA_RESCAN_WAIT)
        threshold = _groups(descriptor) / "drop_subtree_threshold"
        if threshold.exists():
            threshold.write_text(_NO_SKIP)


def limit(path: Path, most_bytes: int) -> None:
    """Bound what a subvolume refers to: past it writes fail with EDQUOT. Raises OSError."""
    _limit(path, _LIMIT_REFERENCED, most_bytes, 0)


def unlimit(path: Path) -> None:
    """Lift both bounds: a copy has those of its source. Raises OSError."""
    _limit(path, _LIMIT_REFERENCED | _LIMIT_EXCLUSIVE, _NO_LIMIT, _NO_LIMIT)


def hold(path: Path, held: bool) -> None:
    """Let no write into a subvolume succeed, whatever its limit, or let go of it again. Raises OSError.

    The bound of what it alone refers to serves for that: nothing else here uses it, and it stays over a restart.
    """
    _limit(path, _LIMIT_EXCLUSIVE, 0, 1 if held else _NO_LIMIT)


def _limit(path: Path, which: int, referenced: int, exclusive: int) -> None:
    """Asked of the folder above: of the subvolume itself, the change is refused where that has no room left."""
    with _opened(path) as descriptor, _opened(path.parent) as parent:
        packed = struct.pack("=6Q", _subvolume_id(descriptor), which, referenced, exclusive, 0, 0)
        fcntl.ioctl(parent, _QGROUP_LIMIT, bytearray(packed))


def settle(path: Path) -> None:
    """Return when all that was written so far is counted, which takes as long as writing it. Raises OSError."""
    with _opened(path) as descriptor:
        fcntl.ioctl(descriptor, _SYNC)


def referenced(path: Path) -> int:
    """How many bytes a subvolume refers to, shared with others or not, as of some seconds ago. Raises OSError."""
    return _count(path, "referenced")


def limited(path: Path) -> int:
    """The bound of a subvolume, 0 for none. Raises OSError."""
    return _count(path, "max_referenced")


def grow(root: Path) -> None:
    """Use all of the device, which has become larger. Raises OSError."""
    with _opened(root) as descriptor:
        fcntl.ioctl(descriptor, _RESIZE, bytearray(_PLAIN_ARGS.pack(0, b"1:max")))


def is_subvolume(path: Path) -> bool:
    """Whether a path on btrfs is the root of a subvolume."""
    try:
        return path.stat().st_ino == _ROOT_INODE
    except FileNotFoundError:
        return False


def _arguments(name: str, source: int = 0, flags: int = 0) -> bytearray:
    return bytearray(_ARGS.pack(source, 0, flags, b"", os.fsencode(name)))


def _subvolume_id(descriptor: int) -> int:
    """The number of the subvolume in which the opened folder lies."""
    buffer = bytearray(struct.pack("=QQ", 0, _ROOT_INODE) + bytes(4080))
    fcntl.ioctl(descriptor, _INO_LOOKUP, buffer)
    (number,) = struct.unpack_from("=Q", buffer)
    return int(number)


_FS_INFO = 2 << 30 | 1024 << 16 | _TYPE | 31


def _count(path: Path, name: str) -> int:
    with _opened(path) as descriptor:
        return int((_groups(descriptor) / f"0_{_subvolume_id(descriptor)}" / name).read_text())


def holds(folder: Path) -> bool:
    """Whether a folder lies on btrfs."""
    with _opened(folder) as descriptor:
        return filesystem_type(descriptor) == MAGIC


def devices(folder: Path) -> set[str]:
    """The numbers, as major:minor, of the devices of the file system of a folder. Raises OSError."""
    with _opened(folder) as descriptor:
        return {path.read_text().strip() for path in (_groups(descriptor).parent / "devices").glob("*/dev")}


def _groups(descriptor: int) -> Path:
    """The folder of the kernel's counts for the file system of an opened folder."""
    buffer = bytearray(1024)
    fcntl.ioctl(descriptor, _FS_INFO, buffer)
    number = buffer[16:32].hex()
    name = "-".join((number[:8], number[8:12], number[12:16], number[16:20], number[20:]))
    if not (_SYSFS / name).is_dir():
        raise OSError(errno.ENOENT, f"find the file system {name} in {_SYSFS}")
    return _SYSFS / name / "qgroups"


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)
