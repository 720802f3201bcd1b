"""What a caller may hold of the server at once is bounded; what a caller held that is gone comes back."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from structlog.testing import capture_logs

from devboxd.http import bounds, document
from devboxd.http.listening import HttpServer, listen
from devboxd.resources import accounts
from support.raw import shut_streams
from support.server import free_port
from support.web import Web

pytestmark = pytest.mark.anyio

MIB = 1 << 20
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Scene:
    """A running server with two keys."""

    def __init__(self, web: Web, port: int, key: str, other: str) -> None:
        self.web = web
        self.port = port
        self.key = key
        self.other = other

    def client(self, key: str) -> httpx.AsyncClient:
        headers = {"connection": "close"} | ({"authorization": f"Bearer {key}"} if key else {})
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=30)

    async def begin(self, method: str, path: str, body: bytes = b"", **headers: str) -> Connection:
        """Send this with the first key, and read nothing."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        lines = {"host": "localhost", "authorization": f"Bearer {self.key}", "content-type": "application/json"}
        head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in {**lines, **headers}.items())
        writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)
        await writer.drain()
        return reader, writer

    async def shut_streams(self, path: str, number: int) -> Connection:
        """One HTTP/2 connection without a key that asks on many streams and takes no byte of an answer."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(shut_streams(path, number))
        await writer.drain()
        return reader, writer


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
        try:
            yield Scene(
                web, port, await accounts.create_key(web.store, "one"), await accounts.create_key(web.store, "two")
            )
        finally:
            server.stop()  # type: ignore[no-untyped-call]
            await asyncio.wait({serving}, timeout=1)
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def settles(client: httpx.AsyncClient, path: str, status: int, **body: object) -> httpx.Response:
    """Ask until the answer has this status: that a client is gone is noticed a moment later."""
    async with asyncio.timeout(10):
        while True:
            answer = await client.post(path, json=body) if body else await client.get(path)
            if answer.status_code == status:
                return answer
            await asyncio.sleep(0.01)


async def test_a_key_has_so_many_requests_in_flight_and_others_are_served(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "REQUESTS_PER_KEY", 3)
    scene.web.things.gate.clear()
    held = [await scene.begin("POST", "/v1/things/a/wait_for_status", content_length="0") for _ in range(3)]
    async with scene.client(scene.key) as client, scene.client(scene.other) as other:
        refused = await settles(client, "/v1/things/b", 429)
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-should-retry"] == "true"
        assert refused.json()["message"].startswith("cannot take this request now: 3 requests of this key")
        assert (await other.get("/v1/things/b")).status_code == 200
        assert (await client.get("/healthz")).status_code == 200
        held.pop()[1].close()
        await settles(client, "/v1/things/b", 200)
        scene.web.things.gate.set()
        for reader, _ in held:
            assert b" 200 " in await reader.readline()
    for _, writer in held:
        writer.close()


@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_of_a_key_take_so_much_memory(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    """Also those that stand still in the middle; when their client leaves, there is room again."""
    monkeypatch.setattr(bounds, "MEMORY_PER_KEY", 3 * MIB)
    sent = b" " * MIB
    half = f"{MIB:x}\r\n".encode() + sent + b"\r\n"
    stalled = [
        await scene.begin("POST", "/v1/unbound", half, transfer_encoding="chunked")
        if chunked
        else await scene.begin("POST", "/v1/unbound", sent, content_length=str(MIB + 1))
        for _ in range(2)
    ]
    async with asyncio.timeout(10):
        while scene.web.app.bounds.memory < 2 * MIB:  # noqa: ASYNC110 (bytes that arrive set no event)
            await asyncio.sleep(0.01)
    async with scene.client(scene.key) as client, scene.client(scene.other) as other:
        body = {"command": "x" * (MIB + MIB // 2)}
        refused = await client.post("/v1/unbound", json=body)
        assert refused.status_code == 429
        assert "of this key fill 3 MiB" in refused.json()["message"]
        assert (await client.post("/v1/unbound", json={"command": "small"})).status_code == 200
        assert (await other.post("/v1/unbound", json=body)).status_code == 200
        for _, writer in stalled:
            writer.transport.abort()
        await settles(client, "/v1/unbound", 200, **body)


async def test_all_keys_together_take_so_much_memory(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MEMORY", MIB)
    async with scene.client(scene.other) as other:
        answer = await other.post("/v1/things", json={"command": "x" * MIB})
        assert answer.status_code == 429
        assert answer.json()["message"].startswith("cannot take this request now: large bodies and answers fill 1 MiB")


async def test_answers_that_are_not_read_count_for_their_key(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MEMORY_PER_KEY", 70 * MIB)
    path = f"/v1/large?size={60 * MIB}"
    _, writer = await scene.begin("POST", path, content_length="0")
    async with scene.client(scene.key) as client, scene.client(scene.other) as other:
        await settles(client, path, 429, command="x")
        assert len((await other.post(path)).content) == 60 * MIB
        writer.transport.abort()
        assert len((await settles(client, path, 200, command="x")).content) == 60 * MIB


async def test_a_wait_ends_when_its_client_leaves(scene: Scene) -> None:
    scene.web.things.gate.clear()
    _, writer = await scene.begin("POST", "/v1/things/a/wait_for_status", b"{}", content_length="2")
    await scene.web.things.entered.wait()
    writer.close()
    async with asyncio.timeout(10):
        await scene.web.things.left.wait()


@pytest.mark.parametrize("path", ["/docs", "/openapi.json"])
async def test_documents_are_rendered_once_and_known_by_their_tag(
    scene: Scene, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene.client("") as client:
        first = await client.get(path, headers={"accept-encoding": "identity"})
        for module, name in (
            (sys.modules["devboxd.http.docs_page"], "page"),
            (sys.modules["devboxd.http.openapi"], "document"),
        ):
            monkeypatch.setattr(module, name, None)
        packed = await client.get(path)
        assert "content-encoding" not in first.headers
        assert packed.headers["content-encoding"] == "gzip"
        assert packed.content == first.content
        assert int(packed.headers["content-length"]) * 2 < int(first.headers["content-length"])
        for answer, encoding in ((first, "identity"), (packed, "gzip")):
            known = {"if-none-match": answer.headers["etag"], "accept-encoding": encoding}
            again = await client.get(path, headers=known)
            assert (again.status_code, again.content) == (304, b"")
        assert first.headers["etag"] != packed.headers["etag"]


async def test_few_may_be_sent_documents_at_once_and_for_so_long(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(document, "READERS", 4)
    async with scene.client("") as client:
        assert (await client.get("/docs")).status_code == 200
        writers = []
        async with asyncio.timeout(30):
            while (refused := await client.get("/docs")).status_code != 503:
                writers.append((await scene.shut_streams("/docs", 60))[1])
        assert refused.headers["retry-after"] == "1"
        assert (await client.get("/healthz")).status_code == 200
        for writer in writers:
            writer.close()
        await settles(client, "/docs", 200)
        monkeypatch.setattr(document, "PATIENCE_S", 0.3)
        with capture_logs() as logs:
            async with asyncio.timeout(30):
                while sum(entry["event"] == "request.cut" for entry in logs) < 4:
                    writers.append((await scene.shut_streams("/docs", 60))[1])
                    await asyncio.sleep(0.1)
        await settles(client, "/docs", 200)
        for writer in writers:
            writer.close()
