"""Routing, decoding, encoding and refusals of the HTTP layer, over ASGI."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
from contextlib import suppress
from typing import Any, Literal

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from devboxd.errors import ApiError
from devboxd.http.binding import BodyDecoder, Parameter
from devboxd.http.operation import Call, Route, Unready, build
from support.web import Body, Web

pytestmark = pytest.mark.anyio
JSON = {"content-type": "application/json"}


def refused(answer: httpx.Response, code: int, *words: str) -> str:
    assert answer.status_code == code, answer.text
    body = answer.json()
    assert set(body) == {"code", "message"}
    assert body["code"] == code
    assert body["message"].startswith("cannot ")
    for word in words:
        assert word in body["message"], body["message"]
    message: str = body["message"]
    return message


async def test_a_body_and_its_defaults_reach_the_handler(web: Web) -> None:
    client = await web.client()
    answer = await client.post("/v1/things", json={"command": "é", "seconds": 3, "later": {"unknown": True}})
    assert answer.status_code == 200
    assert answer.json() == {"thing_id": "thing_1", "command": "é", "count": 3, "times": 1}
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_null_means_absent_where_there_is_a_default(web: Web) -> None:
    client = await web.client()
    body = {"command": "a", "count": None, "seconds": None, "kind": None, "inner": {"size": None, "label": None}}
    answer = await client.post("/v1/things", json=body)
    assert answer.json()["count"] == 3
    refused(await client.post("/v1/things", json={"command": None}), 400, "'command'")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["'command'", "missing"]),
        (b"{}", ["'command'", "missing"]),
        (b"{", ["body"]),
        (b"[1]", ["object"]),
        (b'"x"', ["object"]),
        (b"null", ["object"]),
        (b'{"command": 1}', ["'command'", "expected str, got int"]),
        (b'{"command": "a", "count": "3"}', ["'count'", "expected int"]),
        (b'{"command": "a", "count": 1.5}', ["'count'"]),
        (b'{"command": "a", "kind": "c"}', ["'kind'"]),
        (b'{"command": "a", "inner": {"size": []}}', ["'inner.size'"]),
        (b'{"command": "a"} trailing', ["body"]),
        (b'{"command": "\xff\xfe"}', ["body"]),
        (b'{"command": "\\ud800"}', ["body"]),
        (b"[" * 100_000, ["body"]),
        (b'{"command": "a", "later": ' + b'{"a":' * 5000 + b"1" + b"}" * 5001, ["body"]),
    ],
)
async def test_a_wrong_body_is_refused_with_the_field_named(web: Web, content: bytes, words: list[str]) -> None:
    client = await web.client()
    refused(await client.post("/v1/things", content=content, headers=JSON), 400, *words)
    assert web.things.times == 0


async def test_whole_floats_are_taken_for_integers_and_integers_for_floats() -> None:
    assert BodyDecoder(Body).decode(b'{"command": "a", "count": 3.0, "seconds": 2}') == Body("a", 3, 2.0)


async def test_an_unknown_field_is_named_where_the_body_forbids_it(web: Web) -> None:
    client = await web.client()
    refused(await client.post("/v1/strict", json={"nam": 1}), 400, "'nam'")
    assert (await client.post("/v1/strict")).json() == {"name": ""}


async def test_the_type_of_a_body_must_be_json(web: Web) -> None:
    client = await web.client()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        answer = await client.post("/v1/things", content=b'{"command":"a"}', headers={"content-type": kind})
        refused(answer, 415, "application/json")
        answer = await client.post("/v1/things/word", content=b"{}", headers={"content-type": kind})
        refused(answer, 415, "application/json")
    charset = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await client.post("/v1/things", content=b'{"command":"a"}', headers=charset)).status_code == 200


async def test_a_compressed_body_is_not_taken_for_json(web: Web) -> None:
    client = await web.client()
    answer = await client.post(
        "/v1/things",
        content=gzip.compress(b'{"command":"a"}'),
        headers={"content-encoding": "gzip", "content-type": "application/json"},
    )
    refused(answer, 415, "Content-Encoding 'gzip'")
    plain = {"content-encoding": "identity", "content-type": "application/json"}
    assert (await client.post("/v1/things", content=b'{"command":"a"}', headers=plain)).status_code == 200


async def test_a_body_over_the_limit_is_refused(web: Web) -> None:
    client = await web.client()
    refused(await client.post("/v1/strict", json={"name": "x" * 1001}), 413)

    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    refused(await client.post("/v1/strict", content=pieces(), headers=JSON), 413)
    assert (await client.post("/v1/things", json={"command": "x" * 10_000_000})).status_code == 200


async def test_query_parameters_are_converted(web: Web) -> None:
    client = await web.client()
    plain = (await client.get("/v1/things/abc")).json()
    assert plain == {"thing_id": "abc", "limit": 20, "ratio": 0.5, "deep": False, "name": None, "kind": None}
    given = (await client.get("/v1/things/a%20b?limit=-3&ratio=2&deep=true&name=%C3%A9&kind=b&more=1")).json()
    assert given == {"thing_id": "a b", "limit": -3, "ratio": 2.0, "deep": True, "name": "é", "kind": "b"}
    for text, deep in (("True", True), ("TRUE", True), ("False", False), ("false", False)):
        assert (await client.get(f"/v1/things/x?deep={text}")).json()["deep"] is deep
    assert (await client.get("/v1/things/x?name=")).json()["name"] == ""
    assert (await client.get("/v1/things/x?name=null")).json()["name"] == "null"


@pytest.mark.parametrize(
    "query",
    [
        "limit=a", "limit=", "limit=1.5", "limit=null",  "limit=" + "9" * 40, "limit=" + "x" * 10_000,
        "ratio=nan", "ratio=inf", "ratio=1e999", "ratio=", "deep=1", "deep=yes", "deep=", "kind=c", "kind=",
    ],
)  # fmt: skip
async def test_a_wrong_query_parameter_is_named(web: Web, query: str) -> None:
    client = await web.client()
    message = refused(await client.get(f"/v1/things/x?{query}"), 400, repr(query.partition("=")[0]))
    assert len(message) < 300


async def test_a_needed_query_parameter_and_too_many_of_them(web: Web) -> None:
    client = await web.client()
    refused(await client.get("/v1/need"), 400, "'word'")
    assert (await client.get("/v1/need?word=a&word=b")).json() == {"word": "b"}
    refused(await client.get("/v1/need?" + "&".join(["word=a"] * 200)), 400, "100")


@given(st.text(max_size=50))
async def test_no_text_breaks_the_conversion_of_parameters(text: str) -> None:
    for kind in (int, float | None, bool, str):
        with suppress(ApiError):
            assert isinstance(Parameter("p", kind, None).convert(text), kind)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda v: st.lists(v) | st.dictionaries(st.sampled_from(["command", "count", "seconds", "kind", "inner", "size"]), v)))  # fmt: skip  # noqa: E501
async def test_no_json_breaks_the_decoding_of_bodies(value: Any) -> None:
    with suppress(ApiError):
        assert isinstance(BodyDecoder(Body).decode(json.dumps(value).encode()), Body)


async def test_static_paths_win_over_names_whatever_the_method(web: Web) -> None:
    client = await web.client()
    assert (await client.post("/v1/things/word")).json() == {"word": "yes"}
    answer = await client.get("/v1/things/word")
    refused(answer, 405, "POST")
    assert answer.headers["allow"] == "OPTIONS, POST"


async def test_unknown_paths_and_wrong_methods(web: Web) -> None:
    client = await web.client()
    assert (await client.get("/v1/things/a%2Fb")).status_code == 200
    refused(await client.get("/v1/things%2Fx"), 404)
    for path in ("/x", "/v1", "/v1/", "/v1/nothing", "/v1/things/", "/v1/things/a/b", "//v1/things", "/v1/things/x/"):
        refused(await client.get(path), 404)
    answer = await client.delete("/v1/things")
    refused(answer, 405, "POST")
    assert answer.headers["allow"] == "OPTIONS, POST"
    assert (await client.head("/v1/things")).status_code == 405
    long = await client.get("/v1/" + "x" * 10_000)
    assert len(refused(long, 404)) < 300


async def test_errors_carry_their_code_and_the_word_on_retrying(web: Web) -> None:
    client = await web.client()
    answer = await client.get("/v1/refuse?retry=1")
    refused(answer, 408)
    assert answer.headers["x-should-retry"] == "true"
    answer = await client.get("/v1/refuse")
    refused(answer, 400)
    assert "x-should-retry" not in answer.headers


async def test_a_fault_is_logged_under_its_number_without_its_words(web: Web) -> None:
    client = await web.client()
    with capture_logs() as logs:
        message = refused(await client.get("/v1/fault", headers={"x-word": "hunter2"}), 500, "err_")
    assert "hunter2" not in message
    entry = next(entry for entry in logs if entry["event"] == "request.failed")
    assert entry["error_id"] in message
    assert "in fault" in entry["traceback"]
    assert "hunter2" not in repr(logs)


async def test_nothing_is_served_before_the_server_is_ready(web: Web) -> None:
    client = await web.client()
    web.unready = Unready("the image is being built: 40 %", hold_s=0.2)
    answer = await client.get("/v1/things/x")
    refused(answer, 503, "40 %")
    assert "retry-after" not in answer.headers, "how long is not known: the clients' own pauses grow"
    begun = time.monotonic()
    answer = await client.post("/v1/things/x/wait_for_status", json={})
    refused(answer, 408, "40 %")
    assert answer.headers["x-should-retry"] == "true"
    assert time.monotonic() - begun > 0.15, "held, or the client spins"
    web.unready = Unready("the server stops", hold_s=0, retry_after=5)
    answer = await client.get("/v1/things/x")
    refused(answer, 503, "stops")
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("5", "true")
    health = await client.get("/healthz", headers={"authorization": ""})
    refused(health, 503, "the server stops")
    web.unready = None
    assert (await client.get("/healthz", headers={"authorization": ""})).json() == {"status": "ready"}
    assert (await client.get("/v1/things/x")).status_code == 200


async def test_a_stream_is_passed_on(web: Web) -> None:
    client = await web.client()
    assert (await client.get("/v1/stream")).text == "onetwo"


async def test_a_body_that_stands_still_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devboxd.http.body.STALL_SECONDS", 0.05)
    client = await web.client()

    async def endless() -> Any:
        yield b"{"
        await asyncio.Event().wait()

    answer = await client.post("/v1/things", content=endless(), headers=JSON)
    refused(answer, 408)


async def test_an_upload_that_stands_still_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("devboxd.http.body.STALL_SECONDS", 0.05)
    client = await web.client()

    async def endless() -> Any:
        yield b"begun"
        await asyncio.Event().wait()

    refused(await client.post("/v1/upload", content=endless()), 408)
    assert web.things.uploads == []


def test_handlers_that_do_not_fit_are_refused_at_start(web: Web) -> None:
    async def bare(call, x=1):  # type: ignore[no-untyped-def]
        return None

    async def misnamed(context: Call) -> None:
        return None

    async def strange(x: dict[str, int]) -> None:
        return None

    async def pathless() -> None:
        return None

    for path, handler in (("/a", bare), ("/a", misnamed), ("/a", strange), ("/a/{thing_id}", pathless)):
        with pytest.raises(TypeError):
            build([Route("GET", path, handler, "")], [], store=web.store, settings=web.settings, ready=lambda: None)
    twice = [Route("GET", "/a/{x}", by_x, ""), Route("GET", "/a/{y}", by_y, "")]
    with pytest.raises(TypeError):
        build(twice, [], store=web.store, settings=web.settings, ready=lambda: None)


async def by_x(x: str) -> None:
    return None


async def by_y(y: str) -> None:
    return None


async def test_a_base_url_that_ends_in_v1_is_served(web: Web) -> None:
    client = await web.client(base_url="http://localhost/v1")
    assert (await client.get("/v1/things/a")).json()["thing_id"] == "a"
    assert (await client.get("/v1/v1/things/a")).status_code == 404


async def test_a_wrong_choice_is_told_the_right_ones(web: Web) -> None:
    client = await web.client()
    answer = await client.post("/v1/things", json={"command": "x", "kind": "HUGE"})
    assert answer.json()["message"] == (
        "cannot use the field 'kind': invalid enum value 'HUGE', expected one of a, b; correct it"
    )
    answer = await client.get("/v1/things/a", params={"kind": "HUGE"})
    assert "invalid enum value 'HUGE', expected one of a, b;" in answer.json()["message"]


class Leaf(msgspec.Struct):
    size: Literal["S", "M"] | None = None


class Tree(msgspec.Struct):
    leaves: list[Leaf] | None = None
    named: dict[str, Leaf] | None = None


@pytest.mark.parametrize("body", [b'{"leaves": [{"size": "X"}]}', b'{"named": {"a": {"size": "X"}}}'])
def test_choices_are_found_wherever_they_are(body: bytes) -> None:
    with pytest.raises(ApiError, match="expected one of S, M;"):
        BodyDecoder(Tree).decode(body)
