"""Room that the server keeps for itself on the disk of its state folder, whoever fills that disk.

The pool of disks does not grow into it. When others fill the disk all the same the server gives up a file that took
room for nothing, and goes on with that: it can store what happens, and end boxes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import structlog

_log = structlog.get_logger(__name__)
_MOST = 1 << 30
_SHARE = 20
_LEAST = 2 << 20
_FILE = "reserve"


def reserve(total: int) -> int:
    """How much of a disk of this size the server keeps for itself, in bytes."""
    return min(_MOST, total // _SHARE)


class Reserve:
    """The reserve on the disk of a state folder."""

    def __init__(self, state: Path) -> None:
        self.file = state / _FILE
        self._state = state

    def tend(self) -> None:
        """Look at the disk. Raises OSError."""
        self.give_up_if_full()
        usage = shutil.disk_usage(self._state)
        size = _size(usage.total)
        if usage.free - size > reserve(usage.total) // 2 and not self.file.exists():
            self._take(size)

    def give_up_if_full(self) -> None:
        """Give the room of the file back to the disk when others have taken all the rest."""
        usage = shutil.disk_usage(self._state)
        if usage.free < _size(usage.total) // 4 and self.file.exists():
            self.file.unlink()
            _log.error("the disk is full: the server lives on what it had kept for itself", state=str(self._state))

    def _take(self, size: int) -> None:
        temporary = self.file.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError:
            temporary.unlink()
            raise
        finally:
            os.close(descriptor)
        temporary.rename(self.file)


def _size(total: int) -> int:
    return max(reserve(total) // 4, _LEAST)
