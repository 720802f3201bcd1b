"""The log of a devbox as it grows: first what is there, then every new line, until the devbox has ended.

What a reader has not seen yet stays in the store and the journals: one that is slow costs no memory, and holds nobody
up. Of a running execution only two positions are kept, each at the beginning of a line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass, field

import msgspec

from devboxd.concurrency.waits import wait
from devboxd.devboxes.incidents import Incidents
from devboxd.devboxes.lifecycle import Devboxes
from devboxd.devboxes.logs import entries
from devboxd.devboxes.logs.entries import LogEntry
from devboxd.devboxes.states import TERMINAL
from devboxd.devboxes.store import Devbox
from devboxd.errors import ApiError
from devboxd.executions.box import Boxes
from devboxd.executions.journals import BLOCK, Journals, Stream
from devboxd.executions.looking import UNWATCHED_S, Looking
from devboxd.executions.output import whole_characters
from devboxd.executions.store import COMPLETED, Execution
from devboxd.executions.watch import Watcher
from devboxd.http.streams import HEARTBEAT_S, Closing, EndedEarlyError

_PIECE = 16 * 1024
"""Bytes that are read at once, and the longest line that is told in one entry."""
_ROWS = 100
_PACE_S = 0.05
"""Pause after a wake, so that a devbox that writes without end costs the server little: nobody reads faster."""
_STREAMS: tuple[Stream, Stream] = ("stdout", "stderr")


@dataclass(eq=False)
class _Follower:
    """An execution of which not everything was told; `ended`: its exit code was."""

    row: Execution
    ended: bool
    positions: dict[Stream, int] = field(default_factory=lambda: dict.fromkeys(_STREAMS, 0))


class LogTail:
    """Gives the streams of logs."""

    def __init__(
        self,
        devboxes: Devboxes,
        looking: Looking,
        incidents: Incidents,
        boxes: Boxes,
        journals: Journals,
        watcher: Watcher,
        closing: Closing,
    ) -> None:
        self.devboxes = devboxes
        self.looking = looking
        self.incidents = incidents
        self.boxes = boxes
        self.journals = journals
        self._watcher = watcher
        self._closing = closing

    async def stream(
        self, devbox: Devbox, handle: str | None, shell_name: str | None
    ) -> AsyncGenerator[tuple[LogEntry, ...], None]:
        """Entries as they come (empty: a heartbeat), until the devbox, or the one execution, has ended.

        Raises EndedEarlyError when the server stops before that.
        """
        event = asyncio.Event()
        silence = HEARTBEAT_S
        with ExitStack() as stack:
            stack.enter_context(self._closing.waking(event))
            stack.enter_context(self.devboxes.watching(devbox.id, event))
            stack.enter_context(self.boxes.watching(devbox.id, event))
            if devbox.status not in TERMINAL:
                folder = self.journals.folder / devbox.id
                folder.mkdir(mode=0o700, exist_ok=True)
                if not stack.enter_context(self._watcher.watching(folder, event)):
                    silence = UNWATCHED_S
            tail = _Tail(self, devbox, handle, shell_name)
            yield await tail.begin()
            while True:
                event.clear()
                ended, quiet = await tail.ended(), True
                async with aclosing(tail.news()) as news:
                    async for told in news:
                        quiet = False
                        yield told
                if ended and quiet:
                    return
                if self._closing.begun:
                    raise EndedEarlyError("cannot go on with this log: the server stops; open it again")
                if quiet and not await wait(event, silence):
                    yield ()
                elif quiet:
                    await asyncio.sleep(_PACE_S)


class _Tail:
    """One reader's place in the log of a devbox."""

    def __init__(self, parts: LogTail, devbox: Devbox, handle: str | None, shell_name: str | None) -> None:
        self._parts = parts
        self._devbox = devbox
        self._handle = handle
        self._shell_name = shell_name
        self._open: dict[str, _Follower] = {}
        self._states = 0
        self._incidents_ms = 0
        self._last = ""
        """Executions up to this id were begun to be told; above it, those of `_told`: their rows were earlier."""
        self._told: set[str] = set()

    async def begin(self) -> tuple[LogEntry, ...]:
        """What is in the log already, as far as a list would show it."""
        looking, box_id = self._parts.looking, self._devbox.id
        barrier = self._barrier()
        last = await looking.newest(box_id, None, None, 1)
        self._last = barrier[:-1] if barrier else last[0].id if last else ""
        found = await looking.newest(box_id, self._handle, self._shell_name, entries.MAX_ENTRIES)
        self._told = {row.id for row in found if row.id > self._last}
        rows = [row if row.status == COMPLETED else self._follow(row) for row in found]
        for row in self._running():  # those that began before all that a list shows
            if row.id not in self._open and self._wanted(row) and row.id <= self._last:
                self._follow(row)
        return tuple(await asyncio.to_thread(entries.newest, looking, rows, await self._events()))

    async def ended(self) -> bool:
        """Whether nothing will be added any more."""
        if self._handle is not None:
            return not self._open
        devbox = await self._parts.devboxes.get(self._devbox.account_id, self._devbox.id)
        return devbox.status in TERMINAL and devbox.disk_freed

    async def news(self) -> AsyncGenerator[tuple[LogEntry, ...], None]:
        """What came since the last time, of each execution a piece."""
        if events := await self._events():
            yield tuple(events)
        for row in await self._fresh():
            self._open[row.id] = _Follower(row, ended=row.status == COMPLETED)
            yield (entries.command(row),)
        for follower in list(self._open.values()):
            if not await self._refresh(follower):
                continue
            before = dict(follower.positions)
            for told in self._pieces(follower):
                yield told
            if follower.row.status == COMPLETED and follower.positions == before:
                del self._open[follower.row.id]
                if not follower.ended:
                    yield (entries.command(follower.row),)

    async def _events(self) -> list[LogEntry]:
        if self._handle is not None or self._shell_name is not None:
            return []
        devbox = await self._parts.devboxes.get(self._devbox.account_id, self._devbox.id)
        states = entries.states(devbox)[self._states :]
        self._states += len(states)
        incidents = [item for item in self._parts.incidents.of(devbox.id) if item.time_ms > self._incidents_ms]
        self._incidents_ms = max((item.time_ms for item in incidents), default=self._incidents_ms)
        return entries.in_order(states, incidents)

    async def _fresh(self) -> list[Execution]:
        """Executions that were begun meanwhile, in the order of their ids; rows may come in another order."""
        while self._handle is None:
            barrier, before = self._barrier(), self._last
            rows = await self._parts.looking.after(self._devbox.id, before, _ROWS)
            fresh = [row for row in rows if row.id not in self._told]
            self._told.update(row.id for row in fresh)
            self._last = max((row.id for row in rows if barrier is None or row.id < barrier), default=before)
            self._told = {told for told in self._told if told > self._last}
            wanted = [row for row in fresh if self._wanted(row)]
            if wanted or len(rows) < _ROWS or self._last == before:
                return wanted
        return []

    async def _refresh(self, follower: _Follower) -> bool:
        """Take the row as it is now; False when it was removed."""
        if follower.row.status == COMPLETED:
            return True
        row = self._parts.looking.now(follower.row)
        if row is follower.row and self._parts.boxes.running(row) is None:
            try:
                row = await self._parts.looking.by_id(row.id)
            except ApiError:
                del self._open[row.id]
                return False
        follower.row = row
        return True

    def _pieces(self, follower: _Follower) -> Iterator[tuple[LogEntry, ...]]:
        """The next whole lines of both streams; of an execution that has completed, the last one too."""
        row = follower.row
        ends = (row.stdout_length, row.stderr_length) if row.status == COMPLETED else (None, None)
        for stream, end in zip(_STREAMS, ends, strict=True):
            position = follower.positions[stream]
            if end is not None and position >= end:
                continue
            data = self._read(row, stream, position, _PIECE if end is None else min(_PIECE, end - position))
            final = end is not None and position + len(data) >= end
            used = len(data) if final else whole_lines(data, _PIECE)
            if used:
                follower.positions[stream] += used
                yield tuple(entries.lines(row, stream, data[:used].decode("utf-8", "replace")))

    def _follow(self, row: Execution) -> Execution:
        """Follow a running execution from the end of its last whole line; the row that speaks of what is before."""
        ends = [self._whole(row, stream) for stream in _STREAMS]
        self._open[row.id] = _Follower(row, ended=False, positions=dict(zip(_STREAMS, ends, strict=True)))
        return msgspec.structs.replace(row, stdout_length=ends[0], stderr_length=ends[1])

    def _whole(self, row: Execution, stream: Stream) -> int:
        length = self._parts.journals.length(row.devbox_id, row.id, stream)
        start = max(0, length - BLOCK)
        data = self._read(row, stream, start, length - start)
        return start + whole_lines(data, BLOCK)

    def _read(self, row: Execution, stream: Stream, position: int, size: int) -> bytes:
        with closing(self._parts.journals.reader(row.devbox_id, row.id, stream)) as reader:
            return reader.read(position, size)

    def _wanted(self, row: Execution) -> bool:
        return self._shell_name is None or row.shell_name == self._shell_name

    def _running(self) -> list[Execution]:
        box = self._parts.boxes.find(self._devbox.id)
        if box is None or self._handle is not None:
            return []
        return [running.row for running in box.running.values() if running.committed]

    def _barrier(self) -> str | None:
        """The least id of an execution whose row may come later than those of greater ids."""
        box = self._parts.boxes.find(self._devbox.id)
        running = box.running.values() if box is not None else ()
        return min((one.row.id for one in running if not one.committed), default=None)


def whole_lines(data: bytes, most: int) -> int:
    """How many bytes of `data` are whole lines; when `most` bytes are less than a line, whole characters."""
    if (cut := data.rfind(b"\n") + 1) or len(data) < most:
        return cut
    return whole_characters(data, final=False)[1]
