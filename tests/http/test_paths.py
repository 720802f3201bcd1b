"""What a path and a method mean: HEAD and OPTIONS, methods that a path lacks, and paths that are not there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest

from devboxd.http.binding import Absent
from devboxd.http.operation import build
from devboxd.http.paths import Paths
from devboxd.http.streams import Places, events
from devboxd.routes import ROUTES
from devboxd.unimplemented import UNIMPLEMENTED
from support.serving import Http2, named, served
from support.web import ROUTES as SMALL
from support.web import View, Web

pytestmark = pytest.mark.anyio

PAGES = ("/", "/healthz", "/docs", "/openapi.json")


async def exchange(port: int, *requests: bytes) -> bytes:
    """All bytes that come for these requests on one connection, of which the last one closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"".join(requests))
    try:
        async with asyncio.timeout(10):
            return await reader.read()
    finally:
        writer.close()


@pytest.mark.parametrize("path", PAGES)
async def test_head_is_get_without_its_body(web: Web, path: str) -> None:
    async with served(web) as (port, _), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        got, head = await client.get(path), await client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        for name in ("content-length", "content-type", "etag", "x-content-type-options"):
            assert head.headers.get(name) == got.headers.get(name), name
        assert (await client.get(path)).status_code == 200, "the connection is fit for the next request"


async def test_head_keeps_its_connection_in_step(web: Web) -> None:
    async with served(web) as (port, key):
        lines = f" HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
        asked = [f"HEAD {path}{lines}\r\n".encode() for path in (*PAGES, "/v1/stream", "/nothing", "/v1/things/word")]
        said = await exchange(port, *asked, f"GET /v1/things/x{lines}connection: close\r\n\r\n".encode())
    heads = said.split(b"HTTP/1.1 ")[1:]
    assert [head[:3] for head in heads] == [*[b"200"] * 5, b"404", b"405", b"200"], said
    assert all(head.endswith(b"\r\n\r\n") for head in heads[:-1])


async def test_head_over_http2_has_no_body_either(web: Web) -> None:
    async with served(web) as (port, key), Http2(port) as client:
        streams = [client.send("HEAD", path, named(key)) for path in (*PAGES, "/v1/stream", "/v1/things/x")]
        answers = await client.answers(streams)
        assert set(answers.values()) == {(200, b"")}


async def test_head_of_an_operation_needs_its_key(web: Web) -> None:
    async with await web.client("") as client:
        assert (await client.head("/v1/things/x")).status_code == 401
    async with await web.client() as client:
        answer = await client.head("/v1/things/x")
        assert (answer.status_code, answer.content) == (200, b"")
        assert int(answer.headers["content-length"]) == len((await client.get("/v1/things/x")).content)


@pytest.mark.parametrize(
    ("path", "methods", "words"),
    [
        ("/healthz", "GET, HEAD, OPTIONS", "only GET works there"),
        ("/v1/things", "OPTIONS, POST", "only POST works there"),
        ("/v1/ships/x", "GET, HEAD, OPTIONS, POST", "only GET, POST work there"),
    ],
)
async def test_a_path_tells_its_methods(web: Web, path: str, methods: str, words: str) -> None:
    lacking = [Absent(method, "/v1/ships/{}", "ships", "ships are not built", "swim") for method in ("GET", "POST")]
    web.app = build(
        SMALL,
        (web.store, web.things),
        store=web.store,
        settings=web.settings,
        ready=lambda: None,
        absent=lacking,
    )
    async with await web.client("") as client:
        told = await client.options(path)
        assert (told.status_code, told.headers["allow"], told.content) == (200, methods, b"")
        for method in ("TRACE", "BREW"):
            refused = await client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, methods)
            assert refused.json()["message"] == f"cannot {method} '{path}': {words}"


async def test_options_of_the_whole_server(web: Web) -> None:
    async with served(web) as (port, _):
        said = await exchange(port, b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200"), said
    assert b"allow: GET, HEAD, OPTIONS, POST" in said


@pytest.fixture(scope="module")
def paths() -> Paths:
    found = Paths()
    for row in (*UNIMPLEMENTED, *ROUTES):
        found.add(Absent(row.method, row.path, "", "", ""), row.method, row.path)
    for path in PAGES:
        found.add(Absent("GET", path, "", "", ""), "GET", path)
    return found


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("/devboxes", "/v1/devboxes"),
        ("/devboxes/dbx_1/execute", "/v1/devboxes/dbx_1/execute"),
        ("/v1/devbox", "/v1/devboxes"),
        ("/v1/Devboxes", "/v1/devboxes"),
        ("/v1/devboxes/", "/v1/devboxes"),
        ("//v1/devboxes", "/v1/devboxes"),
        ("/v1/devbox/dbx_1", "/v1/devboxes/dbx_1"),
        ("/v1/devboxes/dbx_1/exec", "/v1/devboxes/dbx_1/execute"),
        ("/v1/devboxes/dbx_1/executeAsync", "/v1/devboxes/dbx_1/execute_async"),
        ("/v1/devboxes/dbx_1/snapshot", "/v1/devboxes/dbx_1/snapshot_disk"),
        ("/v1/devboxes/dbx_1/execution/exe_1", "/v1/devboxes/dbx_1/executions/exe_1"),
        ("/v1/devboxes/a%2Fb/exec", "/v1/devboxes/a/b/execute"),
        ("/v1/blueprint", "/v1/blueprints"),
        ("/v1/healthz", "/healthz"),
        ("/v1/v1/devbox", "/v1/devboxes"),
        ("/health", "/healthz"),
        ("/doc", "/docs"),
        ("/metric", "/metrics"),
        ("/v1/accounts", "/v1/accounts/me"),
        ("/v1/account", "/v1/accounts/me"),
        ("/v1/boxes", "/v1/devboxes"),
        ("/v1/secrtes", "/v1/secrets"),
        ("/v1/repository", "/v1/repositories"),
    ],
)
def test_a_path_that_is_not_there_names_the_nearest(paths: Paths, asked: str, near: str) -> None:
    with pytest.raises(Exception, match=r"cannot find .*: there is no such path; ") as refusal:
        paths.find("POST", asked)
    assert f"; {near!r} is meant perhaps, and /docs lists them all" in str(refusal.value)


FAR = ["/v1/users", "/v1/images", "/v1/projects", "/v1/events", "/v1/actions", "/v1/scores", "/v1/devboxes/dbx_1/lsp"]
ODD = ["", "/favicon.ico", "/v1", "/v1/", "/x" * 5000, "/v1/" + "x" * 100_000, "/%00/%ff"]


@pytest.mark.parametrize("asked", [*ODD, *FAR])
def test_what_is_like_nothing_gets_no_guess(paths: Paths, asked: str) -> None:
    with pytest.raises(Exception, match=r"there is no such path; /docs lists them all$") as refusal:
        paths.find("GET", asked)
    assert len(str(refusal.value)) < 250


async def test_head_of_a_stream_begins_nothing_and_holds_no_place() -> None:
    begun: list[str] = []

    async def source() -> AsyncGenerator[tuple[View, ...], None]:
        begun.append("begun")
        yield (View("a", "b", 1, 1),)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message["type"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    places = Places(1)
    for method, types in (("HEAD", 1), ("GET", 3)):
        sent.clear()
        await events(source(), places)({"type": "http", "method": method}, receive, send)
        assert len(sent) == types, sent
        assert places.taken == 0
    assert begun == ["begun"], "by GET alone"
