"""The files of executions on the host: two journals that only grow, and a spool of stdin.

The agent appends to the journals and reads the spool; the server reads journals and writes the spool. A journal holds
what a box wrote and is hostile: it is read by position up to a cap, never mapped, never trusted for its length.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from devboxd.agent.descriptors import XFS, filesystem_type
from devboxd.engine.inodes import append_only, spread
from devboxd.executions.rations import LEAST, Rations

Stream = Literal["stdout", "stderr"]

BLOCK = 64 * 1024
_PUNCH_HOLE_KEEP_SIZE = 0x03
_SLACK = 1 << 20
"""Bytes past the cap for what file systems round up to and for the server's own words."""
_XFS_AHEAD = 4
"""XFS gives growing files space in advance, up to a multiple of their length."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Journals:
    """The folder of all journals, `state/journals/<devbox>/<execution>.{stdout,stderr,stdin}`."""

    def __init__(self, folder: Path, cap: int, total: int) -> None:
        self.folder = folder
        self._prefix = f"{folder}/"  # plain text: joining a Path costs as much as opening the file
        self.cap = cap
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        spread(folder)
        ahead = _XFS_AHEAD if _on_xfs(folder) else 1
        self._most = cap * ahead + _SLACK
        self.rations = Rations(cap, total)
        self._most_together, self._least = 2 * total * ahead, LEAST * ahead

    def path(self, devbox_id: str, execution_id: str, stream: str) -> Path:
        """Where a stream of an execution lies."""
        return Path(self._name(devbox_id, execution_id, stream))

    def _name(self, devbox_id: str, execution_id: str, stream: str) -> str:
        return f"{self._prefix}{devbox_id}/{execution_id}.{stream}"

    def make(self, devbox_id: str, execution_id: str) -> None:
        """Make both journals, empty, so that they can be watched before the command starts."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._prefix + devbox_id, 0o700)
        for stream in ("stdout", "stderr"):
            name = self._name(devbox_id, execution_id, stream)
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def discard(self, devbox_id: str, execution_id: str) -> None:
        """Remove the journals of an execution that never was."""
        for stream in ("stdout", "stderr"):
            with contextlib.suppress(OSError):
                self.path(devbox_id, execution_id, stream).unlink()

    @contextlib.contextmanager
    def opened(self, devbox_id: str, execution_id: str, stdin: bool) -> Iterator[tuple[int, int, int | None]]:
        """Descriptors for the agent: both journals (append-only) and, when asked for, the spool (read-only).

        Opening again after a crash finds what was written. The descriptors end with the block.
        """
        with contextlib.ExitStack() as stack:

            def opened(stream: str, flags: int) -> int:
                descriptor = os.open(
                    self._name(devbox_id, execution_id, stream), flags | os.O_CREAT | os.O_CLOEXEC, 0o600
                )
                stack.callback(os.close, descriptor)
                return descriptor

            out = opened("stdout", os.O_WRONLY | os.O_APPEND)
            err = opened("stderr", os.O_WRONLY | os.O_APPEND)
            append_only(out, True)
            append_only(err, True)
            yield out, err, opened("stdin", os.O_RDONLY) if stdin else None

    def remove_spool(self, devbox_id: str, execution_id: str) -> None:
        """Give the disk space of a stdin back, if there is one that nobody will read any more."""
        with contextlib.suppress(OSError):
            self.path(devbox_id, execution_id, "stdin").unlink()

    def append(self, devbox_id: str, execution_id: str, stream: Stream, data: bytes) -> None:
        """Add the server's own words (why a command could not start) to a journal."""
        descriptor = os.open(self._name(devbox_id, execution_id, stream), os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)

    def length(self, devbox_id: str, execution_id: str, stream: Stream) -> int:
        """How many bytes a journal holds, at most the cap; 0 when there is none."""
        try:
            return min(os.stat(self._name(devbox_id, execution_id, stream)).st_size, self.cap)
        except FileNotFoundError:
            return 0

    def reader(self, devbox_id: str, execution_id: str, stream: Stream) -> Reader:
        """Open a journal for reading; one that is missing reads as empty."""
        try:
            name = self._name(devbox_id, execution_id, stream)
            return Reader(os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), self.cap)
        except FileNotFoundError:
            return Reader(None, self.cap)

    def measure(self, devbox_id: str) -> tuple[int, bool]:
        """What the journals of a devbox take of the disk, and whether an agent that keeps to its caps can do that."""
        taken = [_taken(status) for _, status in self._made(devbox_id)]
        together, most = sum(taken), self._most_together + len(taken) * self._least + _SLACK
        return together, any(one > self._most for one in taken) or together > most

    def trim(self, devbox_id: str) -> None:
        """Cut what is over in the journals of a devbox that has ended: nobody has them open for writing any more."""
        for path, status in self._made(devbox_id):
            if _taken(status) > self._most:
                _free(path)
                os.truncate(path, min(status.st_size, self.cap))

    def _made(self, devbox_id: str) -> Iterator[tuple[str, os.stat_result]]:
        """The journals of a devbox; the spools beside them are written by the server alone."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder / devbox_id) as entries:
            for entry in entries:
                if not entry.name.endswith(".stdin"):
                    yield entry.path, entry.stat(follow_symlinks=False)

    def remove(self, devbox_id: str) -> None:
        """Delete everything that the executions of a devbox left here."""
        folder = self.folder / devbox_id
        if not folder.exists():
            return
        for path in folder.iterdir():
            _free(path)
        shutil.rmtree(folder)


class Reader:
    """A journal, read by position."""

    def __init__(self, descriptor: int | None, cap: int) -> None:
        self._descriptor = descriptor
        self._cap = cap

    def read(self, offset: int, size: int = BLOCK) -> bytes:
        """At most `size` bytes from `offset`; empty at the end or past the cap. May return less than is there."""
        size = min(size, self._cap - offset)
        if self._descriptor is None or size <= 0:
            return b""
        return os.pread(self._descriptor, size, offset)

    def read_all(self, start: int, end: int) -> bytes:
        """The bytes from `start` to `end`, or fewer where the journal is shorter."""
        parts = []
        while start < end and (part := self.read(start, min(end - start, 1 << 20))):
            parts.append(part)
            start += len(part)
        return b"".join(parts)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Spool:
    """The stdin of one execution: written at the committed length, so that a cut write is written over."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._freed = 0

    def write(self, offset: int, data: bytes) -> None:
        """Put all of `data` at `offset`. Raises OSError when the disk is full; nothing counts as taken then."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset += written
            view = view[written:]

    def free(self, position: int) -> None:
        """Give the disk space before `position` back, in steps of 1 MiB; the agent has read it."""
        step = 1 << 20
        if position - self._freed >= step:
            end = position - position % step
            _libc.fallocate(self._descriptor, _PUNCH_HOLE_KEEP_SIZE, self._freed, end - self._freed)
            self._freed = end

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._descriptor)


def _on_xfs(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return filesystem_type(descriptor) == XFS
    finally:
        os.close(descriptor)


def _taken(status: os.stat_result) -> int:
    """Bytes of the disk. The length says less: fallocate takes blocks behind the end, also of append-only files."""
    return status.st_blocks * 512


def _free(path: str | Path) -> None:
    """Let a journal be cut and deleted again."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        append_only(descriptor, False)
    finally:
        os.close(descriptor)
