"""The pool: where the disks of boxes and their snapshots lie, in `<state>/disks`.

It is btrfs, so that a disk of any size is copied in a moment and has a limit: the state folder's own if that lies on
btrfs, else one in a file, `<state>/pool.btrfs`, which grows when needed. Each byte of the file has a block of the disk
below before the file system on it may use it, and no block ever leaves it: what fills that disk takes nothing from the
pool. Where neither can be had it is plain folders: without limits, and copied file by file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog

from devboxd.engine import btrfs, linux, loops, volumes
from devboxd.engine.processes import which
from devboxd.engine.reserve import reserve
from devboxd.errors import SetupError
from devboxd.path_errors import explained, reason

Kind = Literal["btrfs", "file", "folders"]

_log = structlog.get_logger(__name__)
_SHIELD = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
_GIB = 1 << 30
_FIRST = 4 * _GIB
_LEAST = _GIB
_STEP = _GIB
_UNIT = 64 << 20
"""The file's size is a multiple of it: the kernel complains of devices that end within a block."""
_BLOCK = 4096
_SUPERBLOCK = 64 << 10
_TOTAL = 112
"""Where it says how large the file system is."""
_RELEASES, _RELEASE_S = 300, 0.1


def unwritable(state: Path) -> str | None:
    """Why nothing can be stored on the disk of a state folder, whatever room it has; None when all is well.

    A disk on which the kernel has ended writing need not say that it is read-only: a file is opened for writing.
    """
    read_only = f"the disk of {state} is read-only"
    try:
        if os.statvfs(state).f_flag & os.ST_RDONLY:
            return read_only
        os.close(os.open(state / "lock", os.O_RDWR | os.O_CLOEXEC))
    except (FileNotFoundError, PermissionError):
        return None
    except OSError as error:
        return read_only if error.errno == errno.EROFS else f"the disk of {state} fails: {reason(error)}"
    return None


class PoolBroken(SetupError):
    """The kernel has ended all writing to a pool that is still in use."""


class Pool:
    """The folder of one server's disks. `kind` is known once it is open."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "disks"
        self.file = state / "pool.btrfs"
        self.kind: Kind = "folders"
        self._state = state
        self._device: str | None = None

    @property
    def copies(self) -> bool:
        """Whether disks are volumes, each in a subvolume: with limits, and copied in a moment."""
        return self.kind != "folders"

    def open(self) -> None:
        """Make or find the pool and show it in its folder, where setuid files and devices mean nothing to the host.

        Raises SetupError when there is a pool that cannot be used.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        mounted = self.mounted
        if mounted and self.file.exists():
            self.look()
            if why := self.trouble():
                raise PoolBroken(f"cannot use the pool of disks: {why}; end the boxes that use it, or restart the host")
        if self.file.exists() or (not mounted and self._may_be_file() and self._make_file()):
            if not mounted:
                if self.in_use and self._cut_short():
                    raise PoolBroken(f"cannot use the pool of disks: its file {self.file} was cut short below boxes")
                self._mend_length()
            self.fill()
            if not mounted:
                self._mount_file()
        else:
            if not mounted:
                linux.mount(str(self.folder), self.folder, None, linux.MS_BIND)
            linux.mount("none", self.folder, None, linux.MS_BIND | linux.MS_REMOUNT | _SHIELD)
        self.look()
        if self.kind == "file":
            self._use_all()  # a server that was killed may have made only the file larger
        usage = shutil.disk_usage(self.folder)
        _log.info("storage", kind=self.kind, bytes=usage.total, free=usage.free)

    def look(self) -> None:
        """Find out of which kind the pool is that a server has opened."""
        known = any(self.folder.glob("*/image")) or (volumes.lack() is None and not any(self.folder.glob("*/upper")))
        own = btrfs.holds(self.folder) and known
        self.kind = "file" if self.file.exists() else "btrfs" if own else "folders"

    def close(self) -> None:
        """Take the mount away again; the disks of living boxes stay in use, and the folder closed to all but root."""
        with contextlib.suppress(OSError):
            linux.unmount(self.folder)

    def short_of(self) -> str | None:
        """Why no new disk shall be made: the disk of the state, or the pool in it, is down to its reserve."""
        usage = shutil.disk_usage(self._state)
        kept = reserve(usage.total) // (2 if self.kind == "file" else 1)  # a pool in a file leaves all of the reserve
        if usage.free < kept:
            left = f"it has {usage.free >> 20} MiB left, and {kept >> 20} MiB are kept for the server"
            return f"the disk of {self._state} is full: {left}"
        return None

    def room(self) -> int:
        """Bytes that disks may still take, above what is kept for the file system itself; below 0 when it took of that.

        Raises OSError.
        """
        usage = shutil.disk_usage(self.folder)
        if self.kind != "file":
            return usage.free - reserve(usage.total)
        found = btrfs.free(self.folder) - reserve(usage.total)
        return min(found, self.below()) if self.holes else found

    @property
    def holes(self) -> int:
        """Bytes of the file that have no block on the disk below. Raises OSError."""
        found = self.file.stat()
        return max(0, found.st_size - found.st_blocks * 512)

    def fill(self) -> None:
        """Give blocks to what of the file has none, where the disk below has them. Raises OSError.

        An earlier version made it with room only on paper.
        """
        if not self.file.exists() or not (lacking := self.holes + self.file.stat().st_size % _BLOCK):
            return
        with self._sizing() as file:
            if lacking > (most := self.below()):
                _log.warning("the disk has no room for all of the storage", lacking=lacking, free=most)
                return
            linux.allocate(file, -(-os.fstat(file).st_size // _BLOCK) * _BLOCK)
        _log.info("storage has all of its blocks", bytes=lacking)

    def grow(self, lacking: int) -> bool:
        """Make the file larger by so many bytes or more, as far as the disk below allows; whether it did.

        Raises OSError.
        """
        if self.kind != "file" or lacking <= 0:
            return False
        step = min(max(lacking, _STEP), self.below() - self.holes)
        if step < _UNIT or self.trouble() is not None:
            return False
        with self._sizing() as file:
            size = os.fstat(file).st_size
            wanted = (size + step) // _UNIT * _UNIT
            try:
                linux.allocate(file, wanted)
            except OSError:
                os.ftruncate(file, size)  # what it took so far
                raise
            self._use_all()
        _log.info("storage has grown", was=size, bytes=wanted)
        return True

    def most(self) -> int:
        """How large the file may become, in bytes: with it full, the disk below still holds the reserve."""
        return self.file.stat().st_blocks * 512 + self.below()

    def below(self) -> int:
        """Bytes that the disk below has for a pool in a file, above what is kept for the server. Raises OSError."""
        if self.kind == "btrfs":
            return 0
        host = shutil.disk_usage(self._state)
        return host.free - reserve(host.total)

    def trouble(self) -> str | None:
        """Why nothing can be written to the pool, whatever room there is; None when all is well."""
        try:
            if why := unwritable(self._state):
                return why
            found = os.statvfs(self.folder)
            if found.f_flag & os.ST_RDONLY:
                return "the kernel has ended all writing to the pool of disks; its log (dmesg) says why"
            if self.kind != "file":
                return None
            if self.file.stat().st_size < found.f_blocks * found.f_frsize:
                return f"the pool's file {self.file} was cut short"
            self._read_superblock()
        except OSError as error:
            return f"the pool of disks cannot be read: {reason(error)}"
        return None

    def _read_superblock(self) -> None:
        """From the disk itself, whatever the kernel has in memory. Raises OSError."""
        with loops.attached(self.file, known=self._device) as path:
            self._device = os.path.basename(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            try:
                with mmap.mmap(-1, mmap.PAGESIZE) as buffer:
                    os.preadv(descriptor, [buffer], _SUPERBLOCK)
            finally:
                os.close(descriptor)

    def grow_to(self, wanted: int) -> None:
        """Make the file so large, also beside a server that runs. Raises SetupError when that cannot be."""
        if not self.file.exists():
            raise SetupError(f"cannot grow the storage: it is no file {self.file}; make room on the disk itself")
        try:
            with self._sizing() as file:
                size = os.fstat(file).st_size
                if wanted <= size:
                    raise SetupError(f"cannot grow the storage to {wanted >> 20} MiB: it has {size >> 20} MiB already")
                if wanted > (most := self.most()):
                    raise SetupError(
                        f"cannot grow the storage to {wanted >> 20} MiB: the disk has room for {most >> 20} MiB, what "
                        "is kept for the server aside; free some"
                    )
                linux.allocate(file, -(-wanted // _UNIT) * _UNIT)
            if self.mounted:
                self._use_all()
        except OSError as error:
            raise SetupError(f"cannot grow the storage {self.file}: {explained(error)}") from error

    def let_go(self) -> None:
        """Take away what shows a broken pool, once all boxes have ended. Raises SetupError."""
        while self.mounted:
            self.close()
        for _ in range(_RELEASES):
            if not self.in_use:
                break
            time.sleep(_RELEASE_S)  # nothing tells when the kernel has let go of a file system
        else:
            raise SetupError(f"cannot recover the pool of disks {self.file}: something still uses it; restart the host")

    def mend(self) -> None:
        """Give the file of a broken pool back its length, and check it. Raises OSError."""
        self._mend_length()
        if (program := which("btrfs")) is not None:
            command = (program, "check", "--readonly", self.file)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            _log.warning("storage was checked", damage=bool(done.returncode), said=done.stderr.strip()[-500:])

    def _cut_short(self) -> bool:
        """Whether the file is shorter than the file system on it. Raises OSError."""
        with self.file.open("rb") as file:
            return os.fstat(file.fileno()).st_size < _total(file.fileno())

    def _mend_length(self) -> None:
        """A file that was cut short is of no use; what was lost is read as zeros. Raises OSError."""
        with self.file.open("r+b") as file:
            total = _total(file.fileno())
            if os.fstat(file.fileno()).st_size < total <= self.most():
                _log.error("the storage's file was cut short; what was lost is empty", bytes=total)
                linux.allocate(file.fileno(), total)

    def commit(self) -> None:
        """Have back at once what was deleted: the pool has it again with its next transaction."""
        with contextlib.suppress(OSError), btrfs.opened(self.folder) as descriptor:
            linux.write_back(descriptor)

    @property
    def mounted(self) -> bool:
        """Whether the pool is shown in its folder: by a server that runs, or by one that was killed."""
        return str(self.folder.resolve()) in linux.mount_points()

    @property
    def in_use(self) -> bool:
        """Whether anybody has the file attached, such as boxes that outlive their server."""
        return self.file.exists() and loops.shown(self.file)

    @contextlib.contextmanager
    def _sizing(self) -> Iterator[int]:
        """The file, of which nobody else changes the size meanwhile: to make it smaller would destroy it."""
        with self.file.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file.fileno()

    def _use_all(self) -> None:
        with loops.attached(self.file) as device:
            loops.grow(device)
        btrfs.grow(self.folder)

    def _may_be_file(self) -> bool:
        """Whether a pool in a file is wanted here: not on btrfs, nor where disks lie in plain folders already."""
        return not btrfs.holds(self.folder) and not any(self.folder.iterdir())

    def _make_file(self) -> bool:
        """Make the file with an empty file system; False with a word in the log where that is not possible."""
        size = min(_FIRST, self.below()) // _UNIT * _UNIT
        mkfs = which("mkfs.btrfs")
        why = volumes.lack()
        if size < _LEAST:
            why = "the disk of the state folder is too small"
        elif mkfs is None:
            why = "mkfs.btrfs is missing (package btrfs-progs)"
        elif not linux.has_file_system("btrfs"):
            why = "the kernel offers no btrfs"
        temporary = self.file.with_suffix(".new")
        if why is None and not _allocated(temporary, size):
            why = "the file system of the state folder cannot allocate blocks ahead (ext4, xfs and tmpfs can)"
        if why is not None or mkfs is None:
            _log.warning("storage without limits, snapshots copy file by file", reason=why)
            return False
        command = (mkfs, "--quiet", "--force", "--nodiscard", temporary)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            temporary.unlink()
            raise SetupError(f"cannot make the pool of disks {self.file}: {done.stderr.strip()[-500:]}")
        temporary.rename(self.file)
        return True

    def _mount_file(self) -> None:
        pinned = self.in_use
        try:
            with loops.attached(self.file) as path:
                linux.mount(path, self.folder, "btrfs", _SHIELD | linux.MS_NOATIME, "nodiscard")
        except OSError as error:
            raise (PoolBroken if pinned else SetupError)(
                f"cannot use the pool of disks {self.file}: {reason(error)}; look at the kernel's log, try "
                f"`btrfs check {self.file}`; moving the file away gives up suspended boxes and all snapshots"
            ) from error


def _allocated(file: Path, size: int) -> bool:
    """Make a file with a block for each byte; False where the file system cannot. Raises OSError."""
    with file.open("wb") as opened:
        os.fchmod(opened.fileno(), 0o600)
        try:
            linux.allocate(opened.fileno(), size)
        except OSError as error:
            file.unlink()
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                return False
            raise
    return True


def _total(file: int) -> int:
    """The bytes of the file system on a file, by its superblock; 0 where there is none. Raises OSError."""
    (total,) = struct.unpack("<Q", os.pread(file, 8, _SUPERBLOCK + _TOTAL) or bytes(8))
    return int(total)
