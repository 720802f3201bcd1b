"""The port, held by this server alone.

Granian would share it with whoever asks (SO_REUSEPORT), and the kernel would then deal requests out between two
servers. So the socket is made here, without that, and handed over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path
from typing import Any, cast

from granian._granian import SocketHolder
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.server.embed import Server
from starlette.types import ASGIApp

from devboxd.concurrency.tasks import Tasks
from devboxd.errors import SetupError
from devboxd.http.crowd import Crowd
from devboxd.http.guard import bracketed

_BACKLOG = 2048
_BACKPRESSURE = 4096
"""Connections that are served at once; others wait in the listening socket."""
_MANY = 4
"""From this part of them on, those that ask nothing are closed."""
_UNSENT = 64 * 1024
"""Bytes of an answer that wait for a slow client, beside a few blocks on their way there."""
_STREAMS = 200
"""Streams of one HTTP/2 connection at once; published clients open up to 100."""
_HEADERS = 64 * 1024
"""Bytes of the headers of one HTTP/2 request; the head of a HTTP/1 request is bounded by its buffer, _UNSENT."""
_CONNECTION_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # else what follows a head waits for the client's delayed ACK
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # else what a client held that lost its power is held for ever
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
"""Set on the listening socket: the accepted ones inherit them."""
_PORT_MAX = 65535
_LISTEN = "0A"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket that nobody shares; connections wait in it. Raises SetupError that says what is wrong."""
    where = f"cannot listen on {bracketed(host)}:{port}"
    if not 1 <= port <= _PORT_MAX:
        raise SetupError(f"{where}: a port is a number from 1 to {_PORT_MAX}; choose another --port")
    named = ":" not in host and any(map(str.isalpha, host))  # nobody needs to be asked about numbers
    flags = 0 if named else socket.AI_NUMERICHOST
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)[0]
    except (OSError, UnicodeError) as error:
        raise SetupError(f"{where}: {host!r} is no address of this machine; choose another --host") from error
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after a SIGKILL old connections linger
        for option in _CONNECTION_OPTIONS:
            listener.setsockopt(*option)
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise SetupError(
                f"{where}: the port is in use by {_owner(port)}; stop it or choose another --port"
            ) from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise SetupError(f"{where}: this machine does not have that address; choose another --host") from error
        raise SetupError(f"{where}: {error.strerror}; choose another --host or --port") from error
    listener.setblocking(False)
    return listener


class HttpServer(Server):
    """Granian on a socket that is given to it; it serves HTTP/1.1 and HTTP/2 there until it is stopped."""

    def __init__(self, application: ASGIApp, listener: socket.socket) -> None:
        self.crowd = Crowd(application, listener.getsockname()[1], _BACKPRESSURE // _MANY)
        super().__init__(
            self.crowd,
            interface=Interfaces.ASGINL,
            http=HTTPModes.auto,
            websockets=False,
            backlog=_BACKLOG,
            backpressure=_BACKPRESSURE,
            http1_settings=HTTP1Settings(max_buffer_size=_UNSENT),
            http2_settings=HTTP2Settings(
                max_concurrent_streams=_STREAMS, max_headers_size=_HEADERS, max_send_buffer_size=_UNSENT
            ),
            log_enabled=False,
        )
        self._listener = listener

    async def run(self) -> None:
        """Serve until `stop`, and watch over the places meanwhile."""
        tasks = Tasks()
        tasks.start(self.crowd.watch(), "closing of idle connections")
        try:
            await self.serve()
        finally:
            await tasks.close()

    def _init_shared_socket(self) -> None:
        """Overrides what would bind the port. If a later Granian does not ask here, its own bind fails: ours is taken.

        The worker owns the copy that it is given, and closes it at its end.
        """
        self._shd: Any = cast("Any", SocketHolder)(os.dup(self._listener.fileno()), False, _BACKLOG)


def _owner(port: int) -> str:
    """Who listens on a port of this machine, in words; only root sees everybody's."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", name).read_text().splitlines()[1:]:
                columns = line.split()
                if columns[3] == _LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{columns[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(link) in inodes for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()!r} (pid {process.name})"
    return "another program"
