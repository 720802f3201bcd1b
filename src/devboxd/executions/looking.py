"""Looking at executions: rows from the store, output from the journals, waits and streams. Nothing is changed here."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing

from devboxd.concurrency.waits import wait
from devboxd.errors import bad_request, not_found
from devboxd.executions import store as rows
from devboxd.executions.box import Boxes, unreachable
from devboxd.executions.journals import Journals, Stream
from devboxd.executions.live import LiveExecution
from devboxd.executions.output import follow, tail
from devboxd.executions.store import COMPLETED, Execution
from devboxd.executions.views import Chunk, ExecutionDetailView, ExecutionView, view_of
from devboxd.executions.watch import Watcher
from devboxd.http.streams import HEARTBEAT_S, Closing
from devboxd.store.db import Store

_HANDLE = re.compile(r"[A-Za-z0-9_-]{1,128}")
UNWATCHED_S = 0.5
"""How often a journal is looked at that cannot be watched (the kernel's limit of watches is reached)."""


class Looking:
    """Answers every question about executions of all devboxes."""

    def __init__(self, store: Store, boxes: Boxes, journals: Journals, watcher: Watcher, closing: Closing) -> None:
        self._store = store
        self._boxes = boxes
        self._journals = journals
        self._watcher = watcher
        self._closing = closing

    async def get(self, devbox_id: str, handle: str) -> Execution:
        """The execution of this id on the wire. Raises 400 for a malformed id, 404 for an unknown one."""
        if not _HANDLE.fullmatch(handle):
            raise bad_request(f"cannot use {handle[:64]!r} as an execution id: 1 to 128 letters, digits, '-' or '_'")
        row = await self._store.read(lambda c: rows.by_handle(c, devbox_id, handle))
        if row is None:
            raise not_found(f"cannot find the execution {handle} in {devbox_id}; check both ids")
        return row

    async def by_id(self, execution_id: str) -> Execution:
        """The execution of this internal id. Raises 404 when it was removed."""
        row = await self._store.read(lambda c: rows.by_id(c, execution_id))
        if row is None:
            raise not_found(f"cannot find the execution {execution_id}: it was removed after its retention")
        return row

    async def newest(self, devbox_id: str, handle: str | None, shell_name: str | None, limit: int) -> list[Execution]:
        """The newest executions of a devbox, of one handle or named shell if given, their commands cut when long."""
        found = await self._store.read(lambda c: rows.newest(c, devbox_id, handle, shell_name, limit))
        return [self.now(row) for row in found]

    async def after(self, devbox_id: str, last: str, limit: int) -> list[Execution]:
        """The oldest executions of a devbox with internal ids above `last`, their commands cut when long."""
        found = await self._store.read(lambda c: rows.after(c, devbox_id, last, limit))
        return [self.now(row) for row in found]

    def now(self, row: Execution) -> Execution:
        """The row as memory has it, which the store may not have yet."""
        running = self._boxes.running(row)
        return row if running is None else running.row

    async def reached(self, row: Execution, statuses: frozenset[str], seconds: float) -> Execution | None:
        """The execution as soon as its status is one of these, or None when the time is over or the server stops.

        Also one that has ended is waited for: who is answered at once asks again at once.
        """
        running = self._boxes.running(row) or LiveExecution(await self.by_id(row.id))
        event = asyncio.Event()
        running.wakes.add(event)
        deadline = time.monotonic() + seconds
        try:
            with self._closing.waking(event):
                while running.row.status not in statuses:
                    if self._closing.begun or not await wait(event, deadline - time.monotonic()):
                        return None
                    event.clear()
                return running.row
        finally:
            running.wakes.discard(event)

    async def completed(self, row: Execution) -> Execution:
        """The execution when it has completed, however long that takes."""
        running = self._boxes.running(row)
        if running is not None:
            await running.done.wait()
            return running.row
        row = await self.by_id(row.id)
        if row.status != COMPLETED:
            raise unreachable(row.devbox_id)
        return row

    def view(self, row: Execution, lines: int) -> ExecutionView:
        """The execution with its last lines; a running one shows what it wrote so far."""
        row = self.now(row)
        out, out_cut = self.tail(row, "stdout", lines)
        err, err_cut = self.tail(row, "stderr", lines)
        return view_of(row, out, err, out_cut or row.stdout_truncated, err_cut or row.stderr_truncated)

    def detail(self, row: Execution) -> ExecutionDetailView:
        """The outcome of a completed execution."""
        out, _ = self.tail(row, "stdout", None)
        err, _ = self.tail(row, "stderr", None)
        return ExecutionDetailView(row.devbox_id, out, err, row.exit_status or 0, row.shell_name)

    def tail(self, row: Execution, stream: Stream, lines: int | None) -> tuple[str, bool]:
        """The last lines of the part of a stream that this row speaks of, and whether anything was left out."""
        length = row.stdout_length if stream == "stdout" else row.stderr_length
        if length is None:
            length = self._journals.length(row.devbox_id, row.id, stream)
        if length == 0:
            return "", False  # most commands say nothing on one of the two: no file is opened for that
        with ExitStack() as stack:
            reader = self._journals.reader(row.devbox_id, row.id, stream)
            stack.callback(reader.close)
            return tail(reader, length, lines)

    async def stream(
        self, row: Execution, stream: Stream, offset: int, as_bytes: bool = False
    ) -> AsyncGenerator[tuple[Chunk, ...], None]:
        """The output from byte `offset` on, as it comes, until the execution has completed (empty: a heartbeat).

        `as_bytes`: as base64 of what was written, instead of text.
        """
        running = self._boxes.running(row)
        if running is None:
            row = await self.by_id(row.id)
        event = asyncio.Event()
        path = self._journals.path(row.devbox_id, row.id, stream)
        with ExitStack() as stack:
            reader = self._journals.reader(row.devbox_id, row.id, stream)
            stack.callback(reader.close)
            stack.enter_context(self._closing.waking(event))
            if (box := self._boxes.find(row.devbox_id)) is not None:
                stack.enter_context(box.using("stream"))
            silence = HEARTBEAT_S
            if running is not None:
                if not stack.enter_context(self._watcher.watching(path, event)):
                    silence = UNWATCHED_S
                running.wakes.add(event)
                stack.callback(running.wakes.discard, event)

            def ended_at() -> int | None:
                now = running.row if running is not None else row
                return self._journals.length(row.devbox_id, row.id, stream) if now.status == COMPLETED else None

            async def more() -> bool:
                grown = await wait(event, silence)
                event.clear()
                return grown

            source = follow(reader, offset, ended_at, more, lambda: self._closing.begun, as_bytes)
            async with aclosing(source) as parts:
                async for chunks in parts:
                    yield chunks
