"""The gate before every operation: known host names, keys, CORS, nosniff, and one log line per request."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable
from urllib.parse import quote

import structlog
from sqlalchemy import bindparam, select
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from devboxd.concurrency.clock import now_ms
from devboxd.config import Settings
from devboxd.errors import ApiError, SetupError, bad_request
from devboxd.http.answer import Answer, of_error
from devboxd.http.requests import UNKNOWN, Requests
from devboxd.store.db import Store
from devboxd.store.schema import keys
from devboxd.store.statement import Statement

_NOSNIFF = (b"x-content-type-options", b"nosniff")
_LABEL = r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(\.{_LABEL})*|\[[0-9a-f:.]+\]")
_METHODS = b"GET, POST, PUT, PATCH, DELETE"
_log = structlog.get_logger()
_find_key = Statement(
    select(keys.c.account_id, keys.c.expires_at_ms, keys.c.id).where(
        keys.c.hash == bindparam("hash"), keys.c.revoke_time_ms.is_(None)
    )
)


def hash_key(secret: str) -> str:
    """What the store keeps of a key; keys are random, so a plain hash is enough."""
    return hashlib.sha256(secret.encode(errors="surrogateescape")).hexdigest()


def host_names(domains: Iterable[str]) -> list[bytes]:
    """The names of `domains` as a Host header has them. Raises SetupError for what is no name or address of a host."""
    found = []
    for text in domains:
        try:
            name = text.lower().encode("idna").decode() if not text.isascii() else text.lower()
        except UnicodeError:
            name = ""
        if not _HOST.fullmatch(name):
            raise SetupError(
                f"cannot use {text[:64]!r} in domains: it is no host name; write it without scheme, port and path, as "
                "in devboxes.example.com"
            )
        found.append(name.encode())
    return found


def origins(texts: Iterable[str]) -> list[bytes]:
    """The origins of `cors_origins` as browsers send them. Raises SetupError for what no browser sends."""
    found = []
    for text in texts:
        scheme, _, rest = text.partition("://")
        name, _, port = rest.rpartition(":") if re.search(r":\d+$", rest) else (rest, "", "0")
        if scheme not in ("http", "https") or not _HOST.fullmatch(name) or int(port) >= 1 << 16:
            raise SetupError(
                f"cannot use {text[:64]!r} in cors_origins: browsers send scheme, host in small letters and port, and "
                "nothing after them; write it as in https://app.example.com"
            )
        found.append(text.encode())
    return found


async def authenticate(store: Store, scope: Scope) -> None:
    """Leave account and id of the Bearer key as scope["devboxd.account"] and ["devboxd.key"].

    The key is looked up each time (15 µs), so a revocation holds from the next request on.

    Raises ApiError 401.
    """
    authorization: bytes = scope["devboxd.headers"].get(b"authorization", b"")
    scheme, _, secret = authorization.decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise ApiError(401, "cannot let you in: authentication needs a key; send `Authorization: Bearer ak_...`")
    digest = hash_key(secret.strip())
    account, expires, key = await store.read(lambda c: _find_key.one(c, {"hash": digest})) or ("", None, "")
    if not account or (expires is not None and expires <= now_ms()):
        raise ApiError(
            401, "cannot let you in: this key is invalid, revoked or expired; `devboxd keys create` makes one"
        )
    scope["devboxd.account"], scope["devboxd.key"] = account, key


class Guard:
    """Wraps the application. It leaves the headers as a dict in scope["devboxd.headers"], read once."""

    def __init__(self, inner: ASGIApp, settings: Settings, requests: Requests) -> None:
        self._inner = inner
        self._requests = requests
        self._hosts = {b"localhost", b"127.0.0.1", b"[::1]", bracketed(settings.host).lower().encode()}
        self._hosts |= set(host_names(settings.domains))
        self._origins = set(origins(settings.cors_origins))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request and log it: method, path, status, milliseconds, and who asked; nothing else of it."""
        started = time.perf_counter()
        status, answered = 499, 0.0  # the client left before an answer began
        headers = scope["devboxd.headers"] = dict(scope["headers"])
        extra = self._extra_headers(headers)
        if scope["method"] == "HEAD":
            send = _without_body(send)

        async def decorated(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status, answered = message["status"], time.perf_counter()
                message["headers"] = [*message.get("headers", ()), *extra]
            await send(message)

        try:
            if (refusal := self._check(scope, headers)) is not None:
                await refusal.send(decorated)
            else:
                await self._inner(scope, receive, decorated)
        finally:
            seconds = (answered or time.perf_counter()) - started
            self._requests.count(scope.get("devboxd.operation", UNKNOWN), status, seconds)
            _log_request(scope, status, started)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> Answer | None:
        try:
            self._check_host(scope, headers)
        except ApiError as error:
            return of_error(error)
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            return self._preflight(headers)
        return None

    def _check_host(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if sum(name == b"host" for name, _ in scope["headers"]) != 1:
            raise bad_request("cannot tell which host is meant: send one Host header")
        host = headers[b"host"].lower()
        if not host:  # how the server below shows a request without the header
            if scope["http_version"] in ("1", "1.0") and scope["path"] == "/healthz":
                return  # health checks of load balancers, from before the header
            raise bad_request("cannot tell which host is meant: send a Host header")
        name, colon, port = host.rpartition(b":")
        if not (colon and port.isdigit()):
            name = host
        if name not in self._hosts:
            shown = host[:100].decode("latin-1")
            raise ApiError(421, f"cannot serve the host {shown!r}: it is not known here; add its name to `domains`")

    def _extra_headers(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        if not self._origins:
            return [_NOSNIFF]
        vary = (b"vary", b"origin")
        if (origin := headers.get(b"origin", b"")) not in self._origins:
            return [_NOSNIFF, vary]
        exposed = (b"access-control-expose-headers", b"*")
        return [_NOSNIFF, vary, (b"access-control-allow-origin", origin), exposed]

    def _preflight(self, headers: dict[bytes, bytes]) -> Answer:
        if headers.get(b"origin", b"") not in self._origins:
            return of_error(ApiError(403, "cannot allow this origin: add it to `cors_origins` if you trust it"))
        asked = headers.get(b"access-control-request-headers", b"")
        return Answer(
            200,
            b"",
            (
                (b"access-control-allow-methods", _METHODS),
                (b"access-control-allow-headers", asked),
                (b"access-control-max-age", b"600"),
            ),
        )


def _without_body(send: Send) -> Send:
    """Pass on the head of an answer, the length of its body included, and nothing of the body."""

    async def head_alone(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
            await send({"type": "http.response.body"})

    return head_alone


def bracketed(host: str) -> str:
    """A host as it stands in a URL and in a Host header."""
    return f"[{host}]" if ":" in host else host


def _log_request(scope: Scope, status: int, started: float) -> None:
    write = _log.debug if scope["path"] == "/healthz" and status < 400 else _log.info
    write(
        "request",
        method=scope["method"][:16],
        path=quote(scope["path"][:200], safe="/:@"),
        status=status,
        ms=round((time.perf_counter() - started) * 1000, 2),
        account=scope.get("devboxd.account", ""),
        key=scope.get("devboxd.key", ""),
        address=(scope.get("client") or ("",))[0],
        request_id=quote(scope["devboxd.headers"].get(b"x-request-id", b"")[:100], safe=":@"),
    )
