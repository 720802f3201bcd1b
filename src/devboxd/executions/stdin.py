"""The stdin of executions: text is kept in a spool and its length in the store, then the agent delivers it.

The order that makes `true` mean "delivered, once, whatever dies": spool, commit, tell. The agent alone owns the
position; what was committed and not told is told when the agent is connected again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import msgspec
import structlog
from sqlalchemy import Connection

from devboxd.agent.client import AgentClient, AgentClosedError, AgentError
from devboxd.agent.protocol import Scope
from devboxd.concurrency.threads import finished
from devboxd.executions import store as rows
from devboxd.executions.box import Box, Boxes, patient, unreachable
from devboxd.executions.journals import Journals, Spool
from devboxd.executions.live import LiveExecution
from devboxd.executions.store import COMPLETED, Execution
from devboxd.http.once import Once
from devboxd.store.db import Store

_log = structlog.get_logger()
STDIN_AHEAD = 64 << 20
"""Most bytes of stdin that wait for a reader."""
_SIGINT = 2
_PIECE = 1 << 20


class Stdin:
    """Gives running executions text, its end and interrupts."""

    def __init__(self, store: Store, boxes: Boxes, journals: Journals) -> None:
        self._store = store
        self._boxes = boxes
        self._journals = journals

    async def send(self, row: Execution, content: str | bytes | None, signal: str | None, once: Once) -> bool:
        """Give a command text or bytes, the end of its stdin (EOF) or an interrupt; whether it was taken.

        True is said only after the text and its length are kept for good: the agent delivers it whatever dies.
        Raises 503 while the devbox's agent is being connected.
        """
        if once.ref is not None:
            return True
        running = self._boxes.running(row)
        if running is None or not row.attach_stdin:
            return False
        box = await self._boxes.reached(row.devbox_id)
        async with running.stdin:
            if signal == "INTERRUPT":
                return await self._interrupt(box, running, once)
            return await self._feed(box, running, content or b"", signal == "EOF", once)

    async def tell(self, agent: AgentClient, running: LiveExecution) -> None:
        """Tell the agent how much stdin there is; a reader that is gone or not there yet needs nothing."""
        row = running.row
        if not row.attach_stdin or not (row.stdin_length or row.stdin_eof):
            return
        try:
            self._moved(running, await agent.stdin(row.id, row.stdin_length, row.stdin_eof))
        except (AgentError, AgentClosedError) as error:
            _log.debug("stdin was not told", execution=row.id, error=str(error))

    async def remove(self, running: LiveExecution) -> None:
        """Nobody will read the spool any more but who has it open already: give its disk space back."""
        if not running.row.attach_stdin:
            return
        async with running.stdin:
            if running.spool is not None:
                running.spool.close()
                running.spool = None
            self._journals.remove_spool(running.row.devbox_id, running.row.id)

    async def _interrupt(self, box: Box, running: LiveExecution, once: Once) -> bool:
        try:
            await patient(partial(box.agent.signal, running.row.id, _SIGINT, Scope.GROUP))
        except (AgentError, AgentClosedError):
            return False
        await self._store.write(lambda c: once.bind(c, running.row.id), synced=False)
        return True

    async def _feed(self, box: Box, running: LiveExecution, content: str | bytes, eof: bool, once: Once) -> bool:
        row = running.row
        if row.status == COMPLETED or row.stdin_eof:
            return eof and row.stdin_eof and row.status != COMPLETED
        length = row.stdin_length + sum(map(len, _pieces(content)))
        if not await self._has_room(box, running, length) or not await self._keep(running, content):
            return False

        def commit(connection: Connection) -> None:
            rows.set_stdin(connection, row.id, length, eof)
            once.bind(connection, row.id)

        await self._store.write(commit, synced=False)
        running.row = msgspec.structs.replace(running.row, stdin_length=length, stdin_eof=eof)
        if running.told.is_set():
            await self.tell(box.agent, running)
        return True

    async def _has_room(self, box: Box, running: LiveExecution, length: int) -> bool:
        """Whether a spool of this length is not too far ahead of its reader, who must be there still."""
        if running.told.is_set():
            try:
                self._moved(running, await box.agent.stdin(running.row.id, running.row.stdin_length, False))
            except AgentError:
                return False
            except AgentClosedError as error:
                raise unreachable(box.id) from error
        return length - running.position <= STDIN_AHEAD and running.row.status != COMPLETED

    async def _keep(self, running: LiveExecution, content: str | bytes) -> bool:
        row = running.row
        try:
            if running.spool is None:
                running.spool = Spool(self._journals.path(row.devbox_id, row.id, "stdin"))
            running.spool.free(running.position)
            await finished(partial(_write, running.spool, row.stdin_length, content))
        except OSError as full:
            _log.error("cannot keep stdin", execution=row.id, error=os.strerror(full.errno or 0))
            return False
        return True

    def _moved(self, running: LiveExecution, position: int) -> None:
        """What the agent says comes from the box: it cannot have read more than there is."""
        running.position = max(running.position, min(position, running.row.stdin_length))


def _write(spool: Spool, offset: int, content: str | bytes) -> None:
    for piece in _pieces(content):
        spool.write(offset, piece)
        offset += len(piece)


def _pieces(content: str | bytes) -> Iterator[bytes]:
    """The bytes, or the text in UTF-8, never all of it at once."""
    for start in range(0, len(content), _PIECE):
        piece = content[start : start + _PIECE]
        yield piece.encode() if isinstance(piece, str) else piece
