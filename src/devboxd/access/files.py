"""Files of a box, through descriptors that its agent opens: look-ups, permissions and links are the box's own.

A descriptor may be a regular file or one end of a pipe (files of procfs and the like, served by a child in the box).
What a file claims to be is hostile: lengths are counted, not believed, and nothing is read on the event loop.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from devboxd.access import memory
from devboxd.agent.client import AgentClient, AgentClosedError, AgentError, OpenedTarget
from devboxd.agent.protocol import Stage
from devboxd.concurrency.threads import finished
from devboxd.concurrency.waits import wait
from devboxd.errors import ApiError, bad_request, conflict, not_found
from devboxd.executions.box import Box, as_user

BLOCK = 1 << 20
SILENCE_S = 20.0
"""How long a pipe may neither give nor take: the child in the box that serves it may be hostile, or gone for good."""
_NARROW, _WIDE = 128 << 10, 512 << 10
_MODE = 0o644
_MAX_PATH = 4096


@dataclass(frozen=True)
class Written:
    """What a write put into a file: its size in bytes and its SHA-256 in hexadecimal digits."""

    size: int
    sha256: str


class Pieces:
    """How much of a file is read at a time for a client: few bytes, for a handful of pieces waits in memory until a
    client that may be slow has taken them; many for one at a time, since each piece costs six changes of threads.
    """

    def __init__(self) -> None:
        self._wide_is_free = True

    @contextmanager
    def size(self) -> Iterator[int]:
        """The size for one transfer, which lasts as long as the block."""
        wide, self._wide_is_free = self._wide_is_free, False
        try:
            yield _WIDE if wide else _NARROW
        finally:
            self._wide_is_free |= wide


class OpenFile:
    """A file of a box, opened for reading. `size` is None where only reading tells it."""

    def __init__(self, descriptor: int, pipe: bool, path: str, box: Box, pieces: Pieces) -> None:
        self._box = box
        self._pieces = pieces
        self._descriptor = descriptor
        self._path = path
        self._pipe = pipe
        self._begun = b""
        self.size = None if pipe else os.fstat(descriptor).st_size

    async def begin(self) -> None:
        """Read the first bytes of a pipe: one that stays silent is refused in words, before an answer has begun.

        Raises ApiError.
        """
        if self._pipe:
            with self._box.using("file transfer"):
                self._begun = await self.read(_NARROW)

    async def read(self, size: int = BLOCK) -> bytes:
        """At most `size` bytes from where the last read ended; empty at the end. Raises ApiError."""
        try:
            if self._pipe:
                return await _read_pipe(self._descriptor, size)
            return await finished(partial(os.read, self._descriptor, size))
        except OSError as error:
            raise _explained(error, "read", self._path) from error

    async def chunks(self, limit: int | None = None) -> AsyncGenerator[bytes, None]:
        """All of a file; exactly `size` bytes when that is known, else at most `limit`.

        Raises EOFError when it has shrunk meanwhile, or does not end at the limit.
        """
        left, sent = self.size, 0
        with self._box.using("file transfer"), self._pieces.size() as size:
            while left is None or left > 0:
                data, self._begun = self._begun or await self.read(size if left is None else min(size, left)), b""
                if not data:
                    break
                left = None if left is None else left - len(data)
                sent += len(data)
                if limit is not None and sent > limit:
                    raise EOFError(f"cannot send more than {limit} bytes of the file")
                yield data
        if left:
            raise EOFError("cannot send the rest of the file: it has shrunk")

    async def close(self) -> None:
        """Give the descriptor back, off the event loop."""
        await finished(partial(os.close, self._descriptor))


class Files:
    """Reads and writes files in boxes as the box's user."""

    def __init__(self, entrances: Callable[[str], Sequence[Path]]) -> None:
        """`entrances`: the files by which a process enters the cgroups of a box, by the box's id."""
        self._pieces = Pieces()
        self._entrances = entrances

    async def open(self, box: Box, path: str) -> OpenFile:
        """Open a regular file. Raises ApiError: 400 for a wrong path or type, 403, 404."""
        _check(path)
        try:
            opened = await as_user(box, box.user, path, box.agent.read)
        except (AgentError, AgentClosedError) as error:
            raise _explained(error, "read", path) from error
        return OpenFile(opened.fd, opened.pipe, path, box, self._pieces)

    async def put(self, box: Box, path: str, content: Iterable[bytes], user: str | None = None) -> Written:
        """Write a whole file that is at hand, in pieces. Raises ApiError; the old content stays then."""

        async def pour(into: _Sink) -> None:
            if into.pipe:
                for piece in content:
                    await into.take(piece)
            else:
                await finished(lambda: into.take_all(content))

        return await self._write(box, path, pour, user)

    async def receive(self, box: Box, path: str, chunks: AsyncIterable[bytes]) -> Written:
        """Write a file from chunks, as the box's user, beside its target; rename when all is there.

        Whatever goes wrong before the rename, also an exception of `chunks`, leaves the old content. A file that the
        user may write, in a folder that it may not, is written itself: then what came so far stays. Raises ApiError.
        """

        async def pour(into: _Sink) -> None:
            async for chunk in chunks:
                await into.take(chunk)

        return await self._write(box, path, pour, None)

    async def _write(self, box: Box, path: str, pour: Callable[[_Sink], Awaitable[None]], user: str | None) -> Written:
        _check(path)
        with box.using("file transfer"):
            return await self._poured(box, path, pour, user or box.user)

    async def _poured(self, box: Box, path: str, pour: Callable[[_Sink], Awaitable[None]], who: str) -> Written:
        try:
            agent = box.agent  # it removes the temporary file when this connection ends

            async def write(user: str, path: str) -> tuple[OpenedTarget, str]:
                return await agent.write(user, path, _MODE), user

            target, who = await as_user(box, who, path, write)
        except (AgentError, AgentClosedError) as error:
            raise _explained(error, "write", path) from error
        done = not target.temporary  # the file itself is written: there is nothing to rename
        try:
            try:
                sink = await self._filled(box, target, pour)
            finally:
                await finished(partial(os.close, target.fd))
            if not done:
                await agent.rename(who, target.temporary, target.target)
                done = True
        except (AgentError, OSError) as error:
            raise _explained(error, "write", path) from error
        finally:
            if not done:
                await _unlink(agent, who, target.temporary)
        return Written(sink.size, sink.digest.hexdigest())

    async def _filled(self, box: Box, target: OpenedTarget, pour: Callable[[_Sink], Awaitable[None]]) -> _Sink:
        """Pour all into what was opened. Raises OSError, and what `pour` raises."""
        if target.pipe or not memory.in_memory(target.fd):
            sink = _Sink(target.fd, target.pipe)
            await pour(sink)
            return sink
        async with memory.writer(target.fd, self._entrances(box.id)) as pipe:
            sink = _Sink(pipe, pipe=True)
            await pour(sink)
        return sink


class _Sink:
    """Where the content of a file goes: its descriptor, which may be a pipe, and the count and hash of what went."""

    def __init__(self, descriptor: int, pipe: bool) -> None:
        self.pipe = pipe
        self.size = 0
        self.digest = hashlib.sha256()
        self._descriptor = descriptor

    async def take(self, data: bytes) -> None:
        if not self.pipe:
            await finished(lambda: self.take_all((data,)))
            return
        self._count(data)
        view = memoryview(data)
        while view:
            view = view[await _write_pipe(self._descriptor, view) :]

    def take_all(self, pieces: Iterable[bytes]) -> None:
        """Blocks, so it belongs into a thread."""
        for piece in pieces:
            self._count(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(self._descriptor, view) :]

    def _count(self, data: bytes) -> None:
        self.digest.update(data)
        self.size += len(data)


async def _unlink(agent: AgentClient, user: str, path: bytes) -> None:
    try:
        await asyncio.shield(agent.unlink(user, path))
    except (AgentError, AgentClosedError):
        return  # the agent removes it itself, or its box is gone with its disk


async def _read_pipe(descriptor: int, size: int) -> bytes:
    while True:
        try:
            return os.read(descriptor, min(size, 65536))
        except BlockingIOError:
            await _ready(descriptor, write=False)


async def _write_pipe(descriptor: int, view: memoryview) -> int:
    while True:
        try:
            return os.write(descriptor, view[:65536])
        except BlockingIOError:
            await _ready(descriptor, write=True)


async def _ready(descriptor: int, *, write: bool) -> None:
    loop = asyncio.get_running_loop()
    event = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(descriptor, event.set)
    try:
        if not await wait(event, SILENCE_S):
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
    finally:
        remove(descriptor)


def _check(path: str) -> None:
    if not path or "\0" in path or len(path.encode("utf-8", "surrogatepass")) > _MAX_PATH:
        raise bad_request(
            f"cannot use the path {path[:64]!r}: it has 1 to {_MAX_PATH} bytes, none of them NUL, and is absolute or "
            "relative to the home directory"
        )


def _explained(error: AgentError | OSError, verb: str, path: str) -> ApiError:
    """What a refusal of the box means to a caller."""
    shown = path if len(path) <= 256 else path[:256] + "..."
    stage = error.stage if isinstance(error, AgentError) else Stage.OPEN
    if isinstance(error, AgentClosedError) or stage is Stage.BUSY:
        return ApiError(503, f"cannot {verb} {shown}: the devbox does not answer at the moment; try again")
    if stage is Stage.USER:
        return conflict(
            f"cannot {verb} {shown}: the user of the devbox cannot be used ({error}); put it back into its /etc/passwd"
        )
    words = f"{os.strerror(error.errno or 0).lower()} (os error {error.errno})"
    match error.errno:
        case errno.ENOTDIR if verb == "write":
            return bad_request(f"cannot write {shown}: {words}: a part of the path is a file; name another path")
        case errno.ENOENT | errno.ENOTDIR:
            return not_found(f"cannot {verb} {shown}: the file does not exist: {words}; check the path")
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return ApiError(
                403, f"cannot {verb} {shown}: {words}: the devbox's user may not; choose a path that it owns"
            )
        case errno.EISDIR:
            return bad_request(f"cannot {verb} {shown}: it is a directory: {words}; name a file")
        case errno.ENOSPC | errno.EDQUOT:
            return ApiError(507, f"cannot {verb} {shown}: {words}: the disk is full; delete something", retry=False)
        case errno.ETIMEDOUT:
            why = f"it kept us waiting for {SILENCE_S:g} s; look in the devbox at what holds it up"
            return ApiError(504, f"cannot {verb} {shown}: {why}", retry=False)
        case errno.EINVAL if stage is Stage.TYPE:
            return bad_request(f"cannot {verb} {shown}: it is not a regular file; name one")
    return bad_request(f"cannot {verb} {shown}: {words if error.errno else error}; name another path")
