"""Makes room when connections that ask nothing take the places of others.

The server below serves a bounded number of connections at once. It bounds how long the head of a HTTP/1 request may
take, but not how long a connection may say nothing at all, or keep HTTP/2 open without a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import time
from typing import NamedTuple

import structlog
from starlette.types import ASGIApp, Receive, Scope, Send

_LOOK_S = 2.5
PATIENCE_S = 10.0
"""How long a connection may ask nothing while there are many. Clients mostly close idle ones sooner themselves."""
_DESCRIPTORS = "/proc/self/fd"
_log = structlog.get_logger()


class _Connection(NamedTuple):
    socket: tuple[int, int]
    """What no other socket has while this one lives, as numbers of descriptors and ports are used again."""
    descriptor: int
    peer: str
    """The port on the other side. Alone, without the address, of which there are two spellings: two peers with one
    port are both spared when one of them asks, but a busy connection is never taken for an idle one."""


class Crowd:
    """Wraps the application to know which connections ask; `watch` closes the others when there are too many."""

    def __init__(self, application: ASGIApp, port: int, few: int) -> None:
        """`port` is the one that is served; up to `few` connections nothing is closed."""
        self._application = application
        self._port = port
        self._few = few
        self._asking: dict[str, int] = {}
        self._asked: set[str] = set()
        self._silent: dict[_Connection, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and note who asks it."""
        peer = scope["client"][1] if scope.get("client") else ""
        self._asking[peer] = self._asking.get(peer, 0) + 1
        try:
            await self._application(scope, receive, send)
        finally:
            self._asked.add(peer)
            if (left := self._asking[peer] - 1) > 0:
                self._asking[peer] = left
            else:
                del self._asking[peer]

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(_LOOK_S)
            await self.look(time.monotonic())

    async def look(self, now: float) -> None:
        """Close what has asked nothing since a look of PATIENCE_S before `now`, in seconds."""
        found = await asyncio.to_thread(self._connections)
        asked, self._asked = self._asked, set()
        silent = [one for one in found if one.peer not in asked and one.peer not in self._asking]
        self._silent = {one: self._silent.get(one, now) for one in silent}
        late = [one for one, since in self._silent.items() if now - since >= PATIENCE_S]
        if late:
            await asyncio.to_thread(_shut, late)
            _log.warning("closed connections that asked nothing: there were many", closed=len(late), all=len(found))

    def _connections(self) -> list[_Connection]:
        """The connections of the port, or nothing when they are few."""
        names = os.listdir(_DESCRIPTORS)
        if len(names) <= self._few:
            return []
        found = [one for one in map(self._connection, map(int, names)) if one is not None]
        return found if len(found) > self._few else []

    def _connection(self, descriptor: int) -> _Connection | None:
        """What a descriptor is, if it is a connection of the port; it may be closed and used again meanwhile."""
        with contextlib.suppress(OSError):
            if (identity := _identity(descriptor)) is None:
                return None
            borrowed = socket.socket(fileno=descriptor)
            try:
                if borrowed.family in (socket.AF_INET, socket.AF_INET6) and borrowed.getsockname()[1] == self._port:
                    return _Connection(identity, descriptor, str(borrowed.getpeername()[1]))
            finally:
                borrowed.detach()
        return None


def _identity(descriptor: int) -> tuple[int, int] | None:
    """Device and inode, if it is a socket. Raises OSError when there is no such descriptor."""
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


def _shut(connections: list[_Connection]) -> None:
    """Shut down those that are still there: their owner reads their end and closes them, as if the peer had."""
    for connection in connections:
        with contextlib.suppress(OSError):
            own = os.dup(connection.descriptor)  # so that what was looked at is what is shut down
            if (identity := _identity(own)) is None:
                continue  # a file by now, that stays open: closing a second descriptor of it would drop SQLite's locks
            with socket.socket(fileno=own) as borrowed:
                if identity == connection.socket:
                    borrowed.shutdown(socket.SHUT_RDWR)
