"""The application behind Granian on a real socket: HTTP/1.1, HTTP/2 with prior knowledge, clients that vanish."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import httpx
import pytest

from support.serving import Http2, named, served
from support.until import eventually
from support.web import Web

pytestmark = pytest.mark.anyio


async def talk(port: int, request: bytes) -> bytes:
    """Send bytes and read until the server closes or answers enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        async with asyncio.timeout(5):
            return await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()


async def test_a_health_check_by_http_1_0_needs_no_host(web: Web) -> None:
    async with served(web) as (port, _):
        assert (await talk(port, b"GET /healthz HTTP/1.0\r\n\r\n")).split()[1] == b"200"
        for target, version in ((b"/healthz", b"1.1"), (b"/docs", b"1.0"), (b"/v1/accounts/me", b"1.0")):
            answer = await talk(port, b"GET " + target + b" HTTP/" + version + b"\r\n\r\n")
            assert answer.split()[1] == b"400", (target, version)


async def test_http1_keeps_its_connection(web: Web) -> None:
    async with served(web) as (port, key), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        client.headers["authorization"] = f"Bearer {key}"
        for _ in range(3):
            answer = await client.post("/v1/things", json={"command": "a"}, headers={"x-request-id": "one"})
            assert answer.json()["thing_id"] == "thing_1"
        assert (await client.get("/v1/things/a/b")).status_code == 404
        assert (await client.get("/v1/things/a%2Fb")).json()["thing_id"] == "a/b", "an encoded slash parts nothing"
        assert (await client.get("/healthz")).json() == {"status": "ready"}
    assert web.things.times == 1


async def test_http2_with_prior_knowledge_serves_many_streams_at_once(web: Web) -> None:
    async with served(web) as (port, key), Http2(port) as client:
        body = json.dumps({"command": "a"}).encode()
        streams = [client.send("POST", "/v1/things", named(key), body) for _ in range(100)]
        answers = await client.answers(streams)
        assert {status for status, _ in answers.values()} == {200}
        assert len({content for _, content in answers.values()}) == 100


async def test_http2_knows_the_host_by_its_authority(web: Web) -> None:
    async with served(web) as (port, key):
        # A Host header that differs is what Granian shows; it is judged as the host.
        for headers in (named(key, "evil.example"), [*named(key), ("host", "evil.example")]):
            async with Http2(port) as client:
                stream = client.send("GET", "/v1/accounts/me", headers)
                assert (await client.answers([stream]))[stream][0] == 421, headers
        async with Http2(port) as client:
            stream = client.send("GET", "/v1/accounts/me", named(key))
            assert (await client.answers([stream]))[stream][0] == 200


async def test_http1_hosts_that_conflict_are_refused(web: Web) -> None:
    async with served(web) as (port, _):
        two = await talk(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 400 " in two.splitlines()[0]
        none = await talk(port, b"GET /healthz HTTP/1.1\r\n\r\n")
        assert b" 400 " in none.splitlines()[0]
        other = await talk(port, b"GET /healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert b" 421 " in other.splitlines()[0]


async def test_http1_takes_a_target_in_absolute_form(web: Web) -> None:
    cases = (
        ("http://localhost/healthz", "Host: localhost\r\n", 200),
        ("http://localhost/healthz", "Host: evil.example\r\n", 421),
        ("http://evil.example/healthz", "", 421),  # Granian shows its host where there is no Host header, only there
    )
    async with served(web) as (port, _):
        for target, host, status in cases:
            answer = await talk(port, f"GET {target} HTTP/1.1\r\n{host}\r\n".encode())
            assert int(answer.split()[1]) == status, (target, host)


async def test_a_client_that_vanishes_does_not_cut_the_effect_short(web: Web) -> None:
    async with served(web) as (port, key):
        web.things.gate.clear()
        body = b'{"command": "a"}'
        head = (
            f"POST /v1/things HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nx-request-id: one\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode() + body)
        await web.things.entered.wait()
        writer.transport.abort()
        web.things.gate.set()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            headers = {"authorization": f"Bearer {key}", "x-request-id": "one", "content-type": "application/json"}
            answer = await client.post("/v1/things", content=body, headers=headers)
        assert answer.json()["thing_id"] == "thing_1"
        assert web.things.times == 1


async def test_a_cut_upload_frees_its_id(web: Web) -> None:
    async with served(web) as (port, key):
        head = (
            f"POST /v1/upload HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nx-request-id: one\r\n"
            "Content-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\nhalf"
        )
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head.encode())
        await writer.drain()
        writer.transport.abort()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            headers = {"authorization": f"Bearer {key}", "x-request-id": "one"}
            answer = await client.post("/v1/upload", content=b"whole", headers=headers)
        assert answer.status_code == 200
        assert web.things.uploads == [b"whole"]


async def test_streams_end_when_their_client_leaves(web: Web) -> None:
    async with served(web) as (port, key):
        running = len(asyncio.all_tasks())
        head = f"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        for reader, writer in connections:
            writer.write(head)
            await reader.readuntil(b"still here")
        for _, writer in connections:
            writer.close()
        await eventually(lambda: len(asyncio.all_tasks()) <= running)


async def test_a_stream_that_breaks_is_seen_as_broken(web: Web) -> None:
    async with served(web) as (port, key), httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        headers = {"authorization": f"Bearer {key}"}
        assert (await client.get("/v1/stream", headers=headers)).text == "onetwo"
        with pytest.raises(httpx.RemoteProtocolError):
            await client.get("/v1/stream?broken=true", headers=headers)


async def test_many_held_connections_do_not_shut_others_out(web: Web) -> None:
    async with served(web) as (port, key):
        web.things.gate.clear()
        head = f"POST /v1/unbound HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n\r\n".encode()
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        for _, writer in held:
            writer.write(head)
        assert b" 200 " in await talk(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        web.things.gate.set()
        for reader, writer in held:
            await reader.readuntil(b"{}")
            writer.close()


async def test_a_body_that_is_too_large_is_refused_before_it_is_sent(web: Web) -> None:
    async with served(web) as (port, key):
        head = (
            f"POST /v1/strict HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100000000\r\n\r\n"
        )
        assert b" 413 " in await talk(port, head.encode())


async def test_wrong_requests_do_no_harm(web: Web) -> None:
    noise: list[Any] = [
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"G" * 500_000,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 99,
    ]
    async with served(web) as (port, _):
        for junk in noise:
            with suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError):
                await asyncio.wait_for(talk(port, junk), 1)
        assert b" 200 " in await talk(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
