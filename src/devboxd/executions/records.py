"""What named shells were, kept for as long as their devbox sleeps.

A shell writes its state into a file of the box's memory after each command (`shells.DRIVER`), which ends with the box.
It holds environments: it is kept in the state folder alone, never on the disk of the box, of which snapshots are taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
from functools import partial
from pathlib import Path

import structlog

from devboxd.agent.client import AgentClosedError, AgentError
from devboxd.concurrency.threads import finished
from devboxd.errors import ApiError
from devboxd.executions import store as rows
from devboxd.executions.box import Box, as_user, patient
from devboxd.executions.shells import shell_key
from devboxd.store.db import Store

_MOST_SHELLS = 256
_MOST_BYTES = 4 << 20
_MOST_TOGETHER = 16 << 20
_MOST_SECONDS = 10.0
_WHOLE = re.compile(rb"\A# (\d{1,15})\n(?:.*\n)?#end\n\Z", re.DOTALL)
_log = structlog.get_logger()


class Records:
    """The folder of all records, `state/shells/<devbox>/<key of the shell>`."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder

    async def keep(self, box: Box) -> None:
        """Read the last whole record of each named shell out of a box that is about to end. What fails is logged."""
        try:
            left = _MOST_TOGETHER
            async with asyncio.timeout(_MOST_SECONDS):
                for name in await self._store.read(lambda c: rows.shells(c, box.id, _MOST_SHELLS)):
                    key = shell_key(name)
                    found = [await _read(box, f"/run/devboxd/s/{key}/{number}") for number in (0, 1)]
                    newest = max(found, key=_number)
                    if len(newest) > left:
                        _log.warning("the state of a named shell is not kept: all have 16 MiB", id=box.id, shell=key)
                        self._path(box.id, key).unlink(missing_ok=True)  # an older one would be a wrong one
                    elif _number(newest):
                        left -= len(newest)
                        await finished(partial(self._write, box.id, key, newest))
        except (ApiError, AgentError, AgentClosedError, OSError, TimeoutError) as error:
            _log.warning("cannot keep the state of all named shells", id=box.id, error=str(error))

    def find(self, devbox_id: str, key: str) -> bytes:
        """The record of a shell; empty when none was kept."""
        with contextlib.suppress(FileNotFoundError):
            return self._path(devbox_id, key).read_bytes()
        return b""

    def forget(self, devbox_id: str) -> None:
        """A devbox has ended."""
        shutil.rmtree(self._folder / devbox_id, ignore_errors=True)

    def _write(self, devbox_id: str, key: str, record: bytes) -> None:
        path = self._path(devbox_id, key)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = path.with_suffix(".new")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(record)
        temporary.rename(path)

    def _path(self, devbox_id: str, key: str) -> Path:
        return self._folder / devbox_id / key


def _number(record: bytes) -> int:
    """How many commands the shell had run; 0 for what is no whole record. The box wrote it: anything may be there."""
    match = _WHOLE.match(record)
    return int(match[1]) if match and b"\0" not in record else 0


async def _read(box: Box, path: str) -> bytes:
    """A small file of the box's memory, empty when there is none."""
    try:
        opened = await patient(partial(as_user, box, box.user, path, box.agent.read))
    except AgentError:
        return b""
    try:
        return b"" if opened.pipe else await finished(partial(_whole, opened.fd))
    finally:
        await finished(partial(os.close, opened.fd))


def _whole(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0) if size <= _MOST_BYTES else b""
