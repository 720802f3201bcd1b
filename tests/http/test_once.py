"""Requests with an effect are done once: in one process, over a restart, with other bodies, with streamed bodies."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import suppress

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection, func, select, update
from structlog.testing import capture_logs

from devboxd.concurrency.clock import now_ms
from devboxd.errors import bad_request
from devboxd.http import once
from devboxd.http.once import Row, StreamFingerprint, request_key
from devboxd.store.schema import requests
from support.web import Web

pytestmark = pytest.mark.anyio


def same(request_id: str = "one") -> dict[str, str]:
    return {"x-request-id": request_id, "content-type": "application/json"}


async def rows(web: Web) -> int:
    count = await web.store.read(lambda connection: connection.execute(select(func.count()).select_from(requests)))
    return int(count.scalar_one())


async def test_a_repeated_request_gets_the_same_answer_byte_for_byte(web: Web) -> None:
    client = await web.client()
    for path in ("/v1/things", "/v1/things/with_answer"):
        first = await client.post(path, json={"command": "é"}, headers=same())
        second = await client.post(path, json={"command": "é"}, headers=same())
        assert first.status_code == second.status_code == 200
        assert first.content == second.content
        assert first.headers == second.headers
    assert web.things.times == 2


async def test_requests_without_an_id_are_all_done(web: Web) -> None:
    client = await web.client()
    for value in ({}, {"x-request-id": ""}):
        for _ in range(2):
            await client.post("/v1/unbound", headers=value)
    assert web.things.times == 4
    assert await rows(web) == 0


async def test_another_body_under_the_same_id_is_a_conflict_that_stays(web: Web) -> None:
    client = await web.client()
    await client.post("/v1/things", json={"command": "a"}, headers=same())
    answer = await client.post("/v1/things", json={"command": "b"}, headers=same())
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert web.things.times == 1


async def test_the_id_counts_per_account_method_path_and_query(web: Web) -> None:
    client = await web.client()
    await client.post("/v1/large?size=1", headers=same())
    await client.post("/v1/large?size=2", headers=same())
    await client.post("/v1/unbound", headers=same())
    assert web.things.times == 3
    keys = {request_key(*parts) for parts in (
        ("a", "POST", "/x", b"", b"1"), ("b", "POST", "/x", b"", b"1"), ("a", "PUT", "/x", b"", b"1"),
        ("a", "POST", "/y", b"", b"1"), ("a", "POST", "/x", b"q", b"1"), ("a", "POST", "/x", b"", b"2"),
        ("a", "POST", "/x1", b"", b""), ("aP", "OST", "/x", b"", b"1"),
    )}  # fmt: skip
    assert len(keys) == 8


async def test_duplicates_at_the_same_time_wait_for_the_first(web: Web) -> None:
    client = await web.client()
    web.things.gate.clear()
    calls = [asyncio.ensure_future(client.post("/v1/things", json={"command": "a"}, headers=same())) for _ in range(20)]
    await web.things.entered.wait()
    conflict = await client.post("/v1/things", json={"command": "b"}, headers=same())
    assert conflict.status_code == 409
    web.things.gate.set()
    answers = await asyncio.gather(*calls)
    assert {answer.content for answer in answers} == {answers[0].content}
    assert web.things.times == 1


async def test_an_error_frees_the_id_and_nothing_is_stored(web: Web) -> None:
    client = await web.client()
    web.things.fail = bad_request("cannot do that: not now")
    assert (await client.post("/v1/unbound", headers=same())).status_code == 400
    assert await rows(web) == 0
    web.things.fail = None
    assert (await client.post("/v1/unbound", headers=same())).status_code == 200
    assert (await client.post("/v1/unbound", headers=same())).status_code == 200
    assert web.things.times == 2


async def test_an_effect_that_was_bound_is_resumed_after_an_error(web: Web) -> None:
    client = await web.client()
    web.things.fail = RuntimeError("after the effect")
    assert (await client.post("/v1/things", json={"command": "a"}, headers=same())).status_code == 500
    web.things.fail = None
    answer = await client.post("/v1/things", json={"command": "a"}, headers=same())
    assert answer.json()["thing_id"] == "thing_1"
    assert web.things.times == 1
    assert web.things.resumed == [None, "thing_1"]
    again = await client.post("/v1/things", json={"command": "a"}, headers=same())
    assert again.content == answer.content
    assert len(web.things.resumed) == 2


async def test_answers_outlive_a_restart(web: Web) -> None:
    client = await web.client("")
    key = await _new_key(web)
    client = await web.client(key)
    first = await client.post("/v1/things", json={"command": "a"}, headers=same())
    plain = await client.post("/v1/large?size=5", headers=same())
    await web.app.drain(5)
    web.store.close()
    web.open()
    client = await web.client(key)
    assert (await client.post("/v1/things", json={"command": "a"}, headers=same())).content == first.content
    replayed = await client.post("/v1/large?size=5", headers=same())
    assert replayed.headers["x-size"] == "5"
    assert (replayed.content, replayed.headers) == (plain.content, plain.headers)
    assert web.things.times == 0


async def test_a_crash_between_the_effect_and_its_answer_is_resumed(web: Web) -> None:
    key = await _new_key(web)
    client = await web.client(key)
    await client.post("/v1/things", json={"command": "a"}, headers=same())
    # What a SIGKILL after the effect's transaction leaves: the reference without the answer.
    await web.store.write(lambda connection: connection.execute(update(requests).values(answer=None, status=None)))
    web.store.close()
    web.open()
    client = await web.client(key)
    answer = await client.post("/v1/things", json={"command": "a"}, headers=same())
    assert answer.json()["thing_id"] == "thing_1"
    assert web.things.resumed == ["thing_1"]
    assert web.things.times == 0
    assert (await client.post("/v1/things", json={"command": "b"}, headers=same())).status_code == 409


async def test_a_client_that_leaves_does_not_cut_the_effect_short(web: Web) -> None:
    client = await web.client()
    web.things.gate.clear()
    call = asyncio.ensure_future(client.post("/v1/things", json={"command": "a"}, headers=same()))
    await web.things.entered.wait()
    call.cancel()
    with suppress(asyncio.CancelledError):
        await call
    web.things.gate.set()
    answer = await client.post("/v1/things", json={"command": "a"}, headers=same())
    assert answer.json()["thing_id"] == "thing_1"
    assert web.things.times == 1


async def test_large_answers_are_rendered_again_from_their_reference(web: Web) -> None:
    client = await web.client()
    size = once.BOUND_LIMIT + 1
    for _ in range(2):
        assert len((await client.post(f"/v1/large?size={size}", headers=same())).content) == size
    assert web.things.times == 1
    assert web.things.resumed == [None, "thing_1"]


async def test_old_answers_are_swept(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "_SWEEP_SECONDS", 0.0)
    client = await web.client()
    for number in range(5):
        await client.post("/v1/unbound", headers=same(str(number)))
    old = now_ms() - once.KEPT_SECONDS * 1000 - 1
    await web.store.write(lambda connection: connection.execute(update(requests).values(create_time_ms=old)))
    await client.post("/v1/unbound", headers=same("new"))
    await web.app.drain(5)
    assert await rows(web) == 1


async def test_a_fault_while_answers_are_stored_is_logged_at_once_and_later_answers_are_stored(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await web.client()
    put = Row.put

    def broken(row: Row, connection: Connection, key: str) -> None:
        if row.status is not None:  # what is bound before there is an answer is written as ever
            raise RuntimeError("a fault of the server")
        put(row, connection, key)

    with monkeypatch.context() as fault, capture_logs() as logs:
        fault.setattr(Row, "put", broken)
        await client.post("/v1/things", json={"command": "a"}, headers=same("one"))
        await asyncio.wait(set(web.app._desk._tasks))
    (entry,) = (entry for entry in logs if entry["log_level"] == "error")
    assert (entry["task"], str(entry["exc_info"])) == ("storing of answers", "a fault of the server")
    await client.post("/v1/things", json={"command": "a"}, headers=same("two"))
    await web.app.drain(5)
    stored = await web.store.read(lambda connection: connection.execute(select(requests.c.status)).scalars().all())
    assert sorted(stored, key=str) == [200, None]


async def test_draining_waits_then_cancels_and_keeps_the_binding(web: Web) -> None:
    client = await web.client()
    web.things.gate.clear()
    call = asyncio.ensure_future(client.post("/v1/unbound", headers=same()))
    await web.things.entered.wait()
    await web.app.drain(0.01)
    answer = await call
    assert answer.status_code == 503
    assert answer.headers["x-should-retry"] == "true"
    assert (await client.post("/v1/unbound", headers=same("two"))).status_code == 503
    assert web.things.times == 0


# streamed bodies


def multipart(boundary: str, content: bytes) -> tuple[bytes, dict[str, str]]:
    edge = boundary.encode()
    body = (
        b"--" + edge + b'\r\nContent-Disposition: form-data; name="file"\r\n\r\n' + content + b"\r\n--" + edge + b"--"
    )
    return body, {"x-request-id": "one", "content-type": f"multipart/form-data; boundary={boundary}"}


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def send(client: httpx.AsyncClient, boundary: str, content: bytes, size: int = 1000) -> httpx.Response:
    body, headers = multipart(boundary, content)
    return await client.post("/v1/upload", content=pieces(body, size), headers=headers)


async def test_an_upload_is_done_once_whatever_its_boundary(web: Web) -> None:
    client = await web.client()
    content = os.urandom(100_000)
    first = await send(client, "b" * 32, content)
    second = await send(client, "c" * 40, content, 77)
    assert first.status_code == 200
    assert first.headers["x-sha256"] == hashlib.sha256(web.things.uploads[0]).hexdigest()
    assert (second.content, second.headers) == (first.content, first.headers)
    assert web.things.times == 1
    assert (await send(client, "c" * 40, content + b".")).status_code == 409


async def test_an_upload_whose_client_left_frees_the_id(web: Web) -> None:
    client = await web.client()

    async def cut() -> AsyncIterator[bytes]:
        yield b"half"
        raise OSError("gone")

    headers = {"x-request-id": "one", "content-type": "application/octet-stream"}
    with suppress(OSError):
        await client.post("/v1/upload", content=cut(), headers=headers)
    assert (await client.post("/v1/upload", content=b"whole", headers=headers)).status_code == 200
    assert web.things.uploads == [b"whole"]


async def test_a_second_upload_waits_for_the_first_and_takes_over_when_it_breaks(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("devboxd.http.body.STALL_SECONDS", 0.2)
    client = await web.client()
    begun = asyncio.Event()

    async def stuck() -> AsyncIterator[bytes]:
        yield b"half"
        begun.set()
        await asyncio.Event().wait()

    headers = {"x-request-id": "one", "content-type": "application/octet-stream"}
    first = asyncio.ensure_future(client.post("/v1/upload", content=stuck(), headers=headers))
    await begun.wait()
    second = await client.post("/v1/upload", content=b"whole", headers=headers)
    assert second.status_code == 200
    assert (await first).status_code == 408
    assert web.things.uploads == [b"whole"]


@given(
    st.binary(max_size=200), st.lists(st.integers(1, 20), min_size=1), st.sampled_from([b"", b"ab", b"aab", b"--x--"])
)
async def test_the_fingerprint_does_not_depend_on_how_a_body_is_cut(
    noise: bytes, sizes: list[int], boundary: bytes
) -> None:
    body = noise[:50] + boundary + noise[50:100] + boundary + boundary[:1] + noise[100:] + b"aaab--x"

    async def fingerprint(cuts: list[int]) -> str:
        chunks, at, turn = [], 0, 0
        while at < len(body):
            chunks.append(body[at : at + cuts[turn % len(cuts)]])
            at, turn = at + cuts[turn % len(cuts)], turn + 1
        messages = iter([{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks])

        async def receive() -> dict[str, object]:
            return next(messages, {"type": "http.request", "body": b"", "more_body": False})

        stream = StreamFingerprint(receive, boundary, 5)
        await stream.rest()
        return stream.hexdigest()

    assert await fingerprint(sizes) == await fingerprint([len(body)])
    if not boundary:
        assert await fingerprint(sizes) == hashlib.sha256(body).hexdigest()


async def _new_key(web: Web) -> str:
    from devboxd.resources import accounts

    return await accounts.create_key(web.store, "kept")
