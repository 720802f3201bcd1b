"""Names for boxes: the host's resolvers directly where a box can reach them, else through a forwarder.

The forwarder listens on a loopback address inside the box's own network namespace, on sockets that the server made
there. So no port of the host is opened for it, and the socket itself proves which box asks. What a box sends is
hostile: messages, connections and waiting queries are bounded, and what is past a bound is dropped, as the network
itself may do with any query; resolvers ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devboxd.engine.netns import inside

LISTEN = "127.0.0.53"
PORT = 53
MAX_QUERIES = 128
"""Most queries of one box that wait for an answer."""
MAX_CONNECTIONS = 16
"""Most TCP connections of one box."""
_MAX_DATAGRAM = 4096
_HEADER = 12
_ANSWER_SECONDS = 4.0
_IDLE_SECONDS = 10.0


@dataclass(frozen=True)
class ResolvConf:
    """What matters of a resolv.conf: servers in their order, and the lines on search and options."""

    servers: tuple[str, ...]
    rest: tuple[str, ...]


def read_resolv_conf(path: Path = Path("/etc/resolv.conf")) -> ResolvConf:
    """The host's resolvers; without any, the one on this machine, as the C library does."""
    servers, rest = [], []
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver" and is_address(words[1]):
            servers.append(words[1])
        elif len(words) >= 2 and words[0] in ("search", "options"):
            # The box does not share the host's path to its resolver, so it must not share the trust in its answers.
            rest.append(" ".join(word for word in words if word != "trust-ad"))
    return ResolvConf(tuple(servers[:3]) or ("127.0.0.1",), tuple(rest))


def is_local(address: str) -> bool:
    """Whether an address belongs to this host (loopback included)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def is_address(text: str) -> bool:
    """Whether this is an address of IPv4 or IPv6, the latter also with a zone."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text.partition("%")[0])
        return True
    return False


class Forwarder:
    """Answers the queries of one box with the help of the host's resolvers."""

    def __init__(self, upstreams: Callable[[], Sequence[str]], port: int = PORT, upstream_port: int = PORT) -> None:
        """`upstreams` is asked for each query, because a host's resolvers change while boxes live."""
        self._upstreams = upstreams
        self._port = port
        self._upstream_port = upstream_port
        self._tasks: set[asyncio.Task[None]] = set()
        self._queries = 0
        self._connections = 0
        self._transport: asyncio.DatagramTransport | None = None
        self._server: asyncio.Server | None = None

    async def open(self, netns: Path) -> None:
        """Listen inside the namespace. Raises OSError when something there already has the port."""
        datagrams, stream = await asyncio.to_thread(inside, netns, self._sockets)
        try:
            loop = asyncio.get_running_loop()
            make = functools.partial(_Datagrams, self)
            self._transport, _ = await loop.create_datagram_endpoint(make, sock=datagrams)
            self._server = await asyncio.start_server(self._accept, sock=stream)
        except BaseException:
            stream.close()
            await self.close()
            raise

    async def close(self) -> None:
        """Stop listening and drop the queries that wait. May be called twice."""
        if self._transport is not None:
            self._transport.close()
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def received(self, query: bytes, sender: tuple[str, int]) -> None:
        """Take one datagram of the box."""
        if _HEADER <= len(query) <= _MAX_DATAGRAM and self._queries < MAX_QUERIES:
            self._start(self._answer_datagram(query, sender))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _sockets(self) -> tuple[socket.socket, socket.socket]:
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            datagrams.bind((LISTEN, self._port))
            stream.bind((LISTEN, self._port))
        except BaseException:
            datagrams.close()
            stream.close()
            raise
        return datagrams, stream

    async def _answer_datagram(self, query: bytes, sender: tuple[str, int]) -> None:
        with self._counted():
            answer = await self._first_answer(_ask_by_datagram, query)
        if answer and self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(answer, sender)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Runs in a task of its own that `close` must find, so it registers itself."""
        task = asyncio.current_task()
        if task is None or self._connections >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._tasks.add(task)
        self._connections += 1
        try:
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                await self._serve_connection(reader, writer)
        finally:
            self._connections -= 1
            self._tasks.discard(task)
            writer.transport.abort()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(_IDLE_SECONDS):
                query = await _read_message(reader)
            if len(query) < _HEADER or self._queries >= MAX_QUERIES:
                return
            with self._counted():
                answer = await self._first_answer(_ask_by_stream, query)
            if answer is None:
                return
            writer.write(struct.pack("!H", len(answer)) + answer)
            async with asyncio.timeout(_IDLE_SECONDS):
                await writer.drain()

    @contextlib.contextmanager
    def _counted(self) -> Any:
        self._queries += 1
        try:
            yield
        finally:
            self._queries -= 1

    async def _first_answer(
        self, ask: Callable[[str, int, bytes], Coroutine[Any, Any, bytes]], query: bytes
    ) -> bytes | None:
        """The answer of the first resolver that gives one."""
        for server in self._upstreams():
            with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    return await ask(server, self._upstream_port, query)
        return None


class _Datagrams(asyncio.DatagramProtocol):
    """Hands what arrives in the box's namespace to its forwarder."""

    def __init__(self, forwarder: Forwarder) -> None:
        self._forwarder = forwarder

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._forwarder.received(data, addr)


class _Reply(asyncio.DatagramProtocol):
    """Waits for the one answer that carries the query's id."""

    def __init__(self, query: bytes) -> None:
        self._id = query[:2]
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if len(data) >= _HEADER and data[:2] == self._id and not self.answer.done():
            self.answer.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.answer.done():
            self.answer.set_exception(exc)


async def _ask_by_datagram(server: str, port: int, query: bytes) -> bytes:
    """Each query has a socket of its own: a port chosen by the kernel is half of the protection against forgery."""
    loop = asyncio.get_running_loop()
    transport, reply = await loop.create_datagram_endpoint(lambda: _Reply(query), remote_addr=(server, port))
    try:
        transport.sendto(query)
        return await reply.answer
    finally:
        transport.close()


async def _ask_by_stream(server: str, port: int, query: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(server, port)
    try:
        writer.write(struct.pack("!H", len(query)) + query)
        return await _read_message(reader)
    finally:
        writer.transport.abort()


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("!H", await reader.readexactly(2))
    return await reader.readexactly(length)
