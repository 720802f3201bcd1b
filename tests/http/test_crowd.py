"""Connections that ask nothing do not keep others out: more of them than are served at once, and a client is served."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import pytest

from devboxd.http import crowd, listening
from devboxd.http.listening import HttpServer, listen
from devboxd.resources import accounts
from support.server import free_port
from support.web import Web

pytestmark = pytest.mark.anyio

PLACES = 16
FEW = PLACES // 4
ASK = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\4\0\0\0\0\0"
T = TypeVar("T")
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few places, and a server that does not look by itself but when a test says so."""
    monkeypatch.setattr(listening, "_BACKPRESSURE", PLACES)
    monkeypatch.setattr(crowd, "_LOOK_S", 3600.0)


class Scene:
    """A running server and connections to it."""

    def __init__(self, web: Web, server: HttpServer, port: int, key: str) -> None:
        self.web = web
        self.crowd = server.crowd
        self.port = port
        self.key = key

    async def open(self, number: int, data: bytes = b"") -> list[Connection]:
        """Connections that have sent this; they are accepted as long as there are places."""
        found = [await asyncio.open_connection("127.0.0.1", self.port) for _ in range(number)]
        for _, writer in found:
            writer.write(data)
        return found

    async def ask(self, connection: Connection | None = None) -> None:
        """Ask on this connection, or on a new one, and be answered."""
        reader, writer = connection or (await self.open(1))[0]
        writer.write(ASK)
        await answered(reader)
        if connection is None:
            writer.close()

    async def look_until(self, work: Awaitable[T]) -> T:
        """Let the server look again and again, each time a patience later, until this is done."""
        task, now = asyncio.ensure_future(work), 0.0
        while not task.done():
            await self.crowd.look(now)
            now += crowd.PATIENCE_S
        return await task

    async def insist(self) -> None:
        """Ask until it is answered, as clients do: on a busy machine this clock passes a patience before they spoke."""
        while True:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                return await self.ask()

    def begin(self, method: str, path: str) -> bytes:
        """A request that needs the key."""
        return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {self.key}\r\n\r\n".encode()


async def answered(reader: asyncio.StreamReader) -> None:
    assert b" 200 " in (await reader.readuntil(b"\r\n\r\n")).splitlines()[0]


async def ends(connections: list[Connection]) -> None:
    """Read until the server has closed all of them."""
    for reader, _ in connections:
        with suppress(ConnectionError):
            while await reader.read(65536):
                pass


@pytest.fixture
async def scene(web: Web) -> AsyncIterator[Scene]:
    async with running(web) as found:
        yield found


@asynccontextmanager
async def running(web: Web) -> AsyncIterator[Scene]:
    port = free_port()
    with listen("127.0.0.1", port) as listener:
        server = HttpServer(web.app, listener)
        serving = asyncio.ensure_future(server.run())
        scene = Scene(web, server, port, await accounts.create_key(web.store, "crowd"))
        await scene.ask()
        try:
            yield scene
        finally:
            server.stop()  # type: ignore[no-untyped-call]
            await asyncio.wait({serving}, timeout=1)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


@pytest.mark.parametrize("sent", [b"", PREFACE[:9], PREFACE, PREFACE + SETTINGS, ASK[:9], ASK])
async def test_more_silent_connections_than_places_keep_nobody_out(scene: Scene, sent: bytes) -> None:
    """Each look makes room for as many of those that wait, until few are left and the client has its turn."""
    silent = await scene.open(3 * PLACES, sent)
    await scene.look_until(scene.insist())
    for _, writer in silent:
        writer.close()


async def test_the_server_looks_by_itself(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "_LOOK_S", 0.01)
    monkeypatch.setattr(crowd, "PATIENCE_S", 0.1)
    async with running(web) as scene:
        silent = await scene.open(3 * PLACES)
        await scene.ask()
        for _, writer in silent:
            writer.close()


async def test_nobody_is_closed_before_its_time_or_while_there_are_few(scene: Scene) -> None:
    many = await scene.open(FEW + 1)
    for connection in many:
        await scene.ask(connection)
    await scene.crowd.look(0.0)  # all have asked since the last look
    await scene.crowd.look(1.0)
    await scene.crowd.look(crowd.PATIENCE_S + 0.9)
    for connection in many:
        await scene.ask(connection)
    await scene.crowd.look(crowd.PATIENCE_S + 1.0)
    many.pop()[1].close()
    for connection in many:
        await scene.ask(connection)
    for now in (100.0, 200.0, 300.0):
        await scene.crowd.look(now)
    for connection in many:
        await scene.ask(connection)
        connection[1].close()


async def test_who_waits_for_an_answer_or_reads_one_is_not_closed(scene: Scene) -> None:
    scene.web.things.gate.clear()
    held = await scene.open(1, scene.begin("POST", "/v1/unbound"))
    streams = await scene.open(2, scene.begin("GET", "/v1/events"))
    for reader, _ in streams:
        await reader.readuntil(b"still here")
    await scene.web.things.entered.wait()
    silent = await scene.open(FEW)
    for connection in silent:
        await scene.ask(connection)  # so it was accepted
    await scene.look_until(ends(silent))
    scene.web.things.gate.set()
    for reader, writer in held:
        await answered(reader)
        writer.close()
    for reader, writer in streams:
        await reader.readuntil(b"still here")
        writer.close()


async def test_what_else_has_descriptors_is_left_alone(scene: Scene) -> None:
    """Connections to other ports, and the client's ends of those to this one, which lie in this process too."""
    with listen("127.0.0.1", free_port()) as other:
        other.setblocking(True)
        pairs = [(socket.create_connection(other.getsockname()), other.accept()[0]) for _ in range(2 * FEW)]
    silent = await scene.open(2 * FEW)
    for connection in silent:
        await scene.ask(connection)
    await scene.look_until(ends(silent))
    for ours, theirs in pairs:
        with ours, theirs:
            theirs.sendall(b"on")
            assert ours.recv(2) == b"on"
