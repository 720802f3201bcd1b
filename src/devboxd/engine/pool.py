"""The pool: where the disks of boxes and their snapshots lie, in `<state>/disks`.

It is btrfs, so that a disk of any size is copied in a moment and has a limit: the state folder's own if that lies on
btrfs, else one in a sparse file, `<state>/pool.btrfs`, which grows when needed. Where neither can be had it is plain
folders: without limits, and copied file by file.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import structlog

from devboxd.engine import btrfs, linux, loops, volumes
from devboxd.engine.processes import which
from devboxd.engine.reserve import reserve
from devboxd.errors import SetupError

Kind = Literal["btrfs", "file", "folders"]

_log = structlog.get_logger(__name__)
_SHIELD = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
_GIB = 1 << 30
_FIRST = 16 * _GIB
_LEAST = _GIB
_MARGIN = 8 * _GIB
"""Growing begins when less is free beyond what was promised; nobody writes as much between two looks."""


class Pool:
    """The folder of one server's disks. `kind` is known once it is open."""

    def __init__(self, state: Path) -> None:
        self.folder = state / "disks"
        self.file = state / "pool.btrfs"
        self.kind: Kind = "folders"
        self._state = state
        self._promised: dict[str, int] = {}

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
        if self.file.exists() or (not mounted and self._may_be_file() and self._make_file()):
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
        for what, folder, whose in (
            (f"the disk of {self._state}", self._state, "the server"),
            ("the pool of disks", self.folder, "the devboxes that there are"),
        ):
            usage = shutil.disk_usage(folder)
            kept = reserve(usage.total)
            if usage.free < kept:
                left, kept_mib = usage.free >> 20, kept >> 20
                return f"{what} is full: it has {left} MiB left, and {kept_mib} MiB are kept for {whose}"
        return None

    def promise(self, name: str, most_bytes: int) -> None:
        """Have room for a disk of this size before somebody takes it all at once; 0 for one that is gone.

        Raises OSError.
        """
        if most_bytes:
            self._promised[name] = most_bytes
            self.grow()
        else:
            self._promised.pop(name, None)

    def grow(self) -> bool:
        """Make the file larger when little of the pool is free, as far as the disk below allows; whether it did.

        Raises OSError.
        """
        if self.kind != "file":
            return False
        with self._sizing() as file:
            lacking = sum(self._promised.copy().values()) - shutil.disk_usage(self.folder).free
            if lacking + _MARGIN <= 0:
                return False
            size = os.fstat(file).st_size
            wanted = min(max(2 * size, size + lacking), self.most())
            if wanted - size < _LEAST:
                return False
            os.truncate(file, wanted)
        self._use_all()
        _log.info("storage has grown", was=size, bytes=wanted)
        return True

    def most(self) -> int:
        """How large the file may become, in bytes: with it full, the disk below still holds the reserve."""
        host = shutil.disk_usage(self._state)
        return self.file.stat().st_blocks * 512 + host.free - reserve(host.total)

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
                os.truncate(file, wanted)
            if self.mounted:
                self._use_all()
        except OSError as error:
            raise SetupError(f"cannot grow the storage {self.file}: {error}") from error

    @property
    def mounted(self) -> bool:
        """Whether the pool is shown in its folder: by a server that runs, or by one that was killed."""
        return str(self.folder.resolve()) in linux.mount_points()

    @property
    def in_use(self) -> bool:
        """Whether anybody has the file attached, such as boxes that outlive their server."""
        return loops.shown(self.file)

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
        usage = shutil.disk_usage(self._state)
        size = min(_FIRST, usage.free - reserve(usage.total))
        mkfs = which("mkfs.btrfs")
        why = volumes.lack()
        if size < _LEAST:
            why = "the disk of the state folder is too small"
        elif mkfs is None:
            why = "mkfs.btrfs is missing (package btrfs-progs)"
        elif not linux.has_file_system("btrfs"):
            why = "the kernel offers no btrfs"
        if why is not None or mkfs is None:
            _log.warning("storage without limits, snapshots copy file by file", reason=why)
            return False
        temporary = self.file.with_suffix(".new")
        with temporary.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(size)
        command = (mkfs, "--quiet", "--force", temporary)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            temporary.unlink()
            raise SetupError(f"cannot make the pool of disks {self.file}: {done.stderr.strip()[-500:]}")
        temporary.rename(self.file)
        return True

    def _mount_file(self) -> None:
        try:
            with loops.attached(self.file) as path:
                linux.mount(path, self.folder, "btrfs", _SHIELD | linux.MS_NOATIME, "discard=async")
        except OSError as error:
            raise SetupError(
                f"cannot use the pool of disks {self.file}: {error}; look at the kernel's log, try "
                f"`btrfs check {self.file}`; moving the file away gives up suspended boxes and all snapshots"
            ) from error
