"""lxcfs: the files of /proc that tell each box its own memory, processors, load and uptime, where lxcfs is installed.

One daemon for each server, mounted at <run>/<instance>/lxcfs, in a cgroup of its own among those of the boxes: what it
does for them has limits. It outlives the server, as boxes do, and the next server takes it over. When it dies its files
would fail in every box; the server starts another one and puts its files in their place. Without one, boxes see the
figures of the machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import structlog

from devboxd.concurrency.threads import finished, in_own_thread, readable
from devboxd.engine import linux
from devboxd.engine.base import EngineError, Resources
from devboxd.engine.cgroups import Cgroups
from devboxd.engine.processes import which

_log = structlog.get_logger(__name__)
GROUP = ".lxcfs"
"""The name of its cgroup, which no box can have."""
_LIMITS = Resources(cpu_cores=1, memory_bytes=256 << 20, pids=256)
_FILES = ("cpuinfo", "loadavg", "meminfo", "stat", "uptime")
_PATIENCE_S = 5.0
_AGAIN_S = 10.0
_ENTER = 'for f in $ENTRANCES; do echo 0 >"$f" || exit 1; done; echo 0 >/proc/self/oom_score_adj; exec "$@"'


def lack() -> str | None:
    """What this machine lacks for it, None when boxes can have it."""
    if which("lxcfs") is None:
        return "lxcfs is not installed"
    return None if Path("/dev/fuse").exists() else "the kernel offers no FUSE"


class Lxcfs:
    """The daemon of one server."""

    def __init__(self, directory: Path, cgroups: Cgroups) -> None:
        self._folder = directory / "lxcfs"
        self._cgroups = cgroups
        self._process: subprocess.Popen[bytes] | None = None

    def files(self) -> dict[str, Path]:
        """The files for a new box by their paths in it; none while there is no daemon."""
        found = {f"/proc/{name}": self._folder / "proc" / name for name in _FILES}
        return found if all(map(os.path.exists, found.values())) else {}

    async def open(self, boxes: Callable[[], Mapping[str, int]]) -> None:
        """Take over the daemon, or start one and give its files to the boxes that live: their first processes."""
        if lack() is None and (self._pid() is None or not self.files()):
            await self._start(boxes)

    async def keep(self, boxes: Callable[[], Mapping[str, int]]) -> None:
        """Have one, without end."""
        while lack() is None:
            if (pid := self._pid()) is None:
                _log.error("lxcfs has ended; another one is started, and boxes get its files")
                await self._start(boxes)
                if self._pid() is None:
                    await asyncio.sleep(_AGAIN_S)
                continue
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                try:
                    await readable(descriptor)
                finally:
                    os.close(descriptor)
            if self._process is not None:
                self._process.poll()

    async def close(self) -> None:
        """End it: for a server that leaves no boxes."""
        with contextlib.suppress(EngineError):
            await self._cgroups.remove(GROUP)
        if self._process is not None:
            await finished(self._process.wait)
            self._process = None
        while str(self._folder) in linux.mount_points():
            linux.unmount(self._folder)
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()

    def _pid(self) -> int | None:
        """The daemon's, oldest of all in its cgroup."""
        with contextlib.suppress(OSError):
            members = (self._cgroups.entrances(GROUP)[0].parent / "cgroup.procs").read_text().split()
            ages = {started: int(pid) for pid in members if (started := linux.start_time(int(pid))) is not None}
            return ages[min(ages)] if ages else None
        return None

    async def _start(self, boxes: Callable[[], Mapping[str, int]]) -> None:
        await self.close()
        try:
            await finished(self._launch)
        except OSError as error:
            _log.error("cannot start lxcfs; boxes see the machine's memory and processors", error=str(error))
        for box_id, pid in boxes().items():
            try:
                await in_own_thread(partial(_give, pid, self.files()))
            except OSError as error:
                _log.warning("a box has no files of lxcfs", box=box_id, error=str(error))

    def _launch(self) -> None:
        """Start it, and return when it is mounted. Raises OSError."""
        self._folder.mkdir(mode=0o755, exist_ok=True)
        self._folder.chmod(0o755)
        self._cgroups.create(GROUP, _LIMITS)
        lxcfs = ("lxcfs", "--foreground", "--enable-cfs", "--enable-loadavg", f"--pidfile={self._folder}.pid")
        path, null = os.defpath + ":/usr/sbin:/sbin", subprocess.DEVNULL
        self._process = subprocess.Popen(
            ("/bin/sh", "-c", _ENTER, "sh", *lxcfs, str(self._folder)),
            stdin=null,
            stdout=null,
            stderr=null,
            env={"PATH": path, "ENTRANCES": " ".join(map(str, self._cgroups.entrances(GROUP)))},
            start_new_session=True,
        )
        deadline = time.monotonic() + _PATIENCE_S
        with Path("/proc/self/mountinfo").open() as mounts:
            changed = select.poll()
            changed.register(mounts, select.POLLPRI | select.POLLERR)
            while not self.files():
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise OSError(
                        f"it ended with {self._process.poll()}" if self._process.poll() else "it is not mounted"
                    )
                changed.poll(100)


def _give(pid: int, files: dict[str, Path]) -> None:
    """Put files in the place of those that a box has of a daemon. For a thread that ends then. Raises OSError."""
    trees = {place: linux.clone(file) for place, file in files.items()}
    try:
        linux.enter_mounts(pid)
        for name in _FILES:
            place = Path("/proc", name)
            with contextlib.suppress(OSError):  # the box was made without
                linux.unmount(place)
            if (tree := trees.get(str(place))) is not None:
                linux.settle(tree, place)
                linux.protect(place)
    finally:
        for tree in trees.values():
            os.close(tree)
