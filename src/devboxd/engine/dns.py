"""Names for boxes: the host's resolvers directly where a box can reach them, else through a forwarder.

The forwarder listens on a loopback address inside the box's own network namespace, on sockets that the server made
there. So no port of the host is opened for it, and the socket itself proves which box asks. What a box sends is
hostile: messages, connections and waiting queries are bounded, and what is past a bound is dropped, as the network
itself may do with any query; resolvers ask again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from devboxd.engine.netns import inside

_log = structlog.get_logger()

LISTEN = "127.0.0.53"
PORT = 53
MAX_QUERIES = 128
"""Most queries of one box that wait for an answer."""
MAX_CONNECTIONS = 16
"""Most TCP connections of one box."""
BURST, EACH_SECOND = 500, 200
"""Most queries and new connections of one box that are taken at once, and in a second for long; others wait unread."""
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


class Bucket:
    """A pace: as many tokens as it holds at once, then so many in a second."""

    def __init__(self, most: int, each_second: float) -> None:
        self._most, self._each_second = most, each_second
        self._tokens, self._at = float(most), 0.0

    async def take(self) -> None:
        """Return when a token is there, which is gone then. Those who wait get theirs in the order of their calls."""
        now = asyncio.get_running_loop().time()
        self._tokens = min(self._most, self._tokens + (now - self._at) * self._each_second) - 1
        self._at = now
        await asyncio.sleep(max(0.0, -self._tokens / self._each_second))  # others have their turn in any case


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
        self._pace = Bucket(BURST, EACH_SECOND)
        self._open: tuple[socket.socket, ...] = ()

    async def open(self, netns: Path) -> None:
        """Listen inside the namespace. Raises OSError when something there already has the port."""
        self._open = datagrams, stream = await asyncio.to_thread(inside, netns, self._sockets)
        self._start(self._receive(datagrams))
        self._start(self._accept(stream))

    async def close(self) -> None:
        """Stop listening and drop the queries that wait. May be called twice."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for one in self._open:
            one.close()

    async def _receive(self, datagrams: socket.socket) -> None:
        """Take the datagrams of the box, as fast as it may send them: the kernel drops what comes faster."""
        while True:
            await self._pace.take()
            with contextlib.suppress(OSError):
                query, sender = await _datagram(datagrams)
                if _HEADER <= len(query) <= _MAX_DATAGRAM and self._queries < MAX_QUERIES:
                    self._start(self._answer_datagram(datagrams, query, sender))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            _log.error("the names of a devbox are answered no more", exc_info=error)

    def _sockets(self) -> tuple[socket.socket, socket.socket]:
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            datagrams.bind((LISTEN, self._port))
            stream.bind((LISTEN, self._port))
            stream.listen(MAX_CONNECTIONS)
        except BaseException:
            datagrams.close()
            stream.close()
            raise
        return datagrams, stream

    async def _answer_datagram(self, datagrams: socket.socket, query: bytes, sender: tuple[str, int]) -> None:
        with self._counted():
            answer = await self._first_answer(_ask_by_datagram, query)
        if answer:
            with contextlib.suppress(OSError):  # also where the box reads no answers
                datagrams.sendto(answer, sender)

    async def _accept(self, stream: socket.socket) -> None:
        """Take the connections of the box, as fast as it may make them: the others wait in the kernel."""
        loop = asyncio.get_running_loop()
        while True:
            await self._pace.take()
            with contextlib.suppress(OSError):
                connection, _ = await loop.sock_accept(stream)
                if self._connections < MAX_CONNECTIONS:
                    self._connections += 1
                    self._start(self._answer_connection(connection))
                else:
                    connection.close()

    async def _answer_connection(self, connection: socket.socket) -> None:
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
            try:
                with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
                    await self._serve_connection(reader, writer)
            finally:
                writer.transport.abort()
        finally:
            self._connections -= 1
            connection.close()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            async with asyncio.timeout(_IDLE_SECONDS):
                query = await _read_message(reader)
            await self._pace.take()
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


async def _datagram(one: socket.socket) -> tuple[bytes, tuple[str, int]]:
    """The next datagram and its sender: what `loop.sock_recvfrom` does, which uvloop lacks. Raises OSError."""
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()
    while True:
        with contextlib.suppress(BlockingIOError):
            return one.recvfrom(_MAX_DATAGRAM + 1)
        arrived.clear()
        loop.add_reader(one, arrived.set)
        try:
            await arrived.wait()
        finally:
            loop.remove_reader(one)


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    (length,) = struct.unpack("!H", await reader.readexactly(2))
    return await reader.readexactly(length)
