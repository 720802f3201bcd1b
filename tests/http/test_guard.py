"""The gate: hosts, keys, origins, headers, and what the log may say."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from sqlalchemy import insert, update
from structlog.testing import capture_logs

from devboxd.config import Settings
from devboxd.http.guard import hash_key
from devboxd.resources import accounts
from devboxd.store.db import Store
from devboxd.store.schema import keys
from support.web import Web

pytestmark = pytest.mark.anyio


async def raw(web: Web, headers: list[tuple[bytes, bytes]], method: str = "GET", path: str = "/healthz") -> Any:
    """Call the application with exactly these headers, as a client library never would."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": headers}
    scope |= {"raw_path": path.encode(), "http_version": "1.1"}
    await web.app(scope, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:8080", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:8080", "10.0.0.7:80", "box.example"],
)
async def test_known_hosts_are_served(tmp_path: Any, host: str) -> None:
    web = Web(tmp_path / "devboxd.db", Settings(host="10.0.0.7", domains=("box.example",)))
    status, headers, _ = await raw(web, [(b"host", host.encode())])
    assert status == 200
    assert headers[b"x-content-type-options"] == b"nosniff"
    web.store.close()


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "localhost.evil.example", "evil@localhost", "127.0.0.2", "::1", "localhost:80:80", "localhost.",
        "localhost,evil.example", "[::1", "0x7f.1", "local\xadhost", "x" * 10_000, ":80", " ",
    ],
)  # fmt: skip
async def test_other_hosts_are_421_on_every_path(web: Web, host: str) -> None:
    for path in ("/healthz", "/docs", "/v1/accounts/me", "/nothing"):
        status, headers, body = await raw(web, [(b"host", host.encode("latin-1"))], path=path)
        assert status == 421
        assert headers[b"x-content-type-options"] == b"nosniff"
        assert msgspec.json.decode(body)["message"].startswith("cannot ")
        assert len(body) < 400


@pytest.mark.parametrize(
    "hosts", [[], [b""], [b"localhost", b"localhost"], [b"localhost", b"evil.example"], [b"evil.example", b"localhost"]]
)
async def test_no_host_and_two_hosts_are_400(web: Web, hosts: list[bytes]) -> None:
    status, _, _ = await raw(web, [(b"host", host) for host in hosts])
    assert status == 400


@pytest.mark.parametrize(
    "value",
    [None, "", "Bearer", "Bearer ", "Basic YTpi", "ak_abc", "Bearer ak_wrong", "Bearer \xff", "Bearer " + "x" * 10_000],
)
async def test_without_a_right_key_there_is_401(web: Web, value: str | None) -> None:
    await accounts.create_key(web.store, "other")
    headers = [(b"host", b"localhost")]
    if value is not None:
        headers.append((b"authorization", value.encode("latin-1")))
    status, answered, body = await raw(web, headers, path="/v1/accounts/me")
    assert status == 401
    assert dict(answered)[b"www-authenticate"] == b"Bearer"
    assert msgspec.json.decode(body)["code"] == 401


async def test_a_key_opens_its_account(web: Web) -> None:
    client = await web.client()
    view = (await client.get("/v1/accounts/me")).json()
    assert view["id"].startswith("acc_")
    assert view["account_status"] == "ACCOUNT_STATUS_ENABLED"
    assert view["tier"].startswith("ACCOUNT_TIER_")
    assert view["billing"]["account_billing_type"]
    assert isinstance(view["created_at"], str)
    lower = await client.get(
        "/v1/accounts/me", headers={"authorization": client.headers["authorization"].replace("B", "b", 1)}
    )
    assert lower.status_code == 200


async def test_revoking_in_another_process_works_at_once(web: Web) -> None:
    client = await web.client()
    assert (await client.get("/v1/accounts/me")).status_code == 200
    other = Store.open(web.path)
    (key,) = await accounts.list_keys(other)
    await accounts.revoke_key(other, key.id)
    assert (await client.get("/v1/accounts/me")).status_code == 401
    other.close()


async def test_an_expired_key_opens_nothing(web: Web) -> None:
    client = await web.client()
    past = time.time_ns() // 1_000_000 - 1
    await web.store.write(lambda connection: connection.execute(update(keys).values(expires_at_ms=past)))
    assert (await client.get("/v1/accounts/me")).status_code == 401


async def test_only_hashes_are_stored(web: Web) -> None:
    secret = await accounts.create_key(web.store, "x")
    assert secret.startswith("ak_")
    assert len(secret) == 46
    web.store.close()
    files = b"".join(path.read_bytes() for path in web.path.parent.iterdir())
    assert secret.encode() not in files
    assert hash_key(secret).encode() in files


async def test_a_foreign_origin_gets_no_permission(web: Web) -> None:
    client = await web.client()
    origin = {"origin": "https://evil.example"}
    answer = await client.get("/v1/accounts/me", headers=origin)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    preflight = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = await client.options("/v1/things", headers=preflight)
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_listed_origin_gets_a_proper_preflight(tmp_path: Any) -> None:
    web = Web(tmp_path / "devboxd.db", Settings(cors_origins=("https://app.example",)))
    client = await web.client()
    origin = {"origin": "https://app.example"}
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-request-id"}
    answer = await client.options("/v1/things", headers={**origin, **asked})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert answer.headers["access-control-allow-headers"] == "authorization, x-request-id"
    answer = await client.get("/v1/accounts/me", headers=origin)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    assert answer.headers["vary"] == "origin"
    answer = await client.get("/v1/accounts/me", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "origin"
    web.store.close()


async def test_the_log_tells_path_and_outcome_and_nothing_secret(web: Web) -> None:
    client = await web.client()
    secret = "hunter2"
    with capture_logs() as logs:
        await client.get(f"/v1/things/x?name={secret}", headers={"x-secret": secret})
        await client.post("/v1/things", json={"command": secret}, headers={"x-request-id": "req\x1b1"})
        await client.post("/v1/things", json={"command": secret, "count": secret})
        await client.post("/v1/things", content=secret, headers={"content-type": "application/json"})
        await client.get("/v1/accounts/me", headers={"authorization": f"Bearer {secret}"})
        await client.get("/v1/new%0aline%1b[31m")
    assert secret not in repr(logs)
    assert client.headers["authorization"].removeprefix("Bearer ") not in repr(logs)
    assert [(entry["method"], entry["status"]) for entry in logs] == [
        ("GET", 200), ("POST", 200), ("POST", 400), ("POST", 400), ("GET", 401), ("GET", 404)
    ]  # fmt: skip
    assert logs[0]["path"] == "/v1/things/x"
    assert logs[0]["account"].startswith("acc_")
    assert [entry["key"] for entry in logs] == [*[(await accounts.list_keys(web.store))[0].id] * 4, "", ""]
    assert {entry["address"] for entry in logs} == {"127.0.0.1"}
    assert [entry["request_id"] for entry in logs] == ["", "req%1B1", "", "", "", ""]
    assert logs[-1]["path"] == "/v1/new%0Aline%1B%5B31m"


async def test_a_refused_statement_does_not_tell_its_values(web: Web) -> None:
    row = {"id": "key_1", "account_id": "acc_1", "name": "hunter2", "hash": "h", "create_time_ms": 1}
    await web.store.write(lambda connection: connection.execute(insert(keys), row))
    with pytest.raises(Exception, match="UNIQUE") as caught:
        await web.store.write(lambda connection: connection.execute(insert(keys), row))
    assert "hunter2" not in str(caught.value)


async def test_a_cookie_never_authenticates(web: Web) -> None:
    key = (await accounts.create_key(web.store, "cookie")).encode()
    for cookie in (b"authorization=Bearer " + key, b"key=" + key, b"session=" + key):
        status, _, _ = await raw(web, [(b"host", b"localhost"), (b"cookie", cookie)], path="/v1/accounts/me")
        assert status == 401
