"""Operations: the rows of the route table become one ASGI application that decodes, calls and encodes."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import secrets
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from devboxd.config import Settings
from devboxd.errors import ApiError, timed_out
from devboxd.http import body as bodies
from devboxd.http import pages
from devboxd.http.answer import WHOLE, Answer, of_error, of_value
from devboxd.http.binding import Absent, Binding, Operation, Route
from devboxd.http.body import BIG_BYTES, Body
from devboxd.http.bounds import Bounds, Held
from devboxd.http.call import Call
from devboxd.http.guard import Guard, authenticate
from devboxd.http.once import Desk, Once, StreamFingerprint, request_key
from devboxd.http.paths import OtherMethodError, Paths
from devboxd.http.requests import Requests
from devboxd.store.db import Store

__all__ = ["Application", "Call", "Route", "Unready", "build"]

_BODYLESS = ("GET", "HEAD", "OPTIONS")
_log = structlog.get_logger()


@dataclass(frozen=True)
class Unready:
    """Why /v1 is not served now: the reason in words, and how callers are sent away.

    They get 503, with `retry_after` (seconds) where it is known when to come again. Waits are held for `hold_s` and
    end with 408: the published wait loops take that for "ask again", and would raise a 503.
    """

    reason: str
    hold_s: float
    retry_after: int | None = None


def build(
    routes: Sequence[Route],
    services: Sequence[object],
    *,
    store: Store,
    settings: Settings,
    ready: Callable[[], Unready | None],
    healthy: Callable[[], Unready | None] | None = None,
    requests: Requests | None = None,
    absent: Sequence[Absent] = (),
) -> Application:
    """The application for a table. `ready` gives None, or the reason why /v1 is not served yet; `healthy` what
    /healthz says, the same if not given.

    Every request is counted in `requests`. The operations in `absent` are refused by their names.
    """
    return Application(
        routes,
        services,
        store=store,
        settings=settings,
        ready=ready,
        healthy=healthy or ready,
        requests=requests or Requests(),
        absent=absent,
    )


class Application:
    """The ASGI application; `drain` ends the requests that outlive their connections."""

    def __init__(
        self,
        routes: Sequence[Route],
        services: Sequence[object],
        *,
        store: Store,
        settings: Settings,
        ready: Callable[[], Unready | None],
        healthy: Callable[[], Unready | None],
        requests: Requests,
        absent: Sequence[Absent],
    ) -> None:
        self._store = store
        self._ready = ready
        self._desk = Desk(store)
        self.bounds = Bounds()
        own = pages.routes(lambda: _unready_error(healthy()), lambda: self.operations, absent)
        known = {kind: service for service in services for kind in type(service).__mro__[:-1]}
        self.operations = [
            Operation(route, Binding(route.handler, route.path, Call, known)) for route in (*routes, *own)
        ]
        self._paths = Paths()
        for operation in self.operations:
            self._paths.add(operation, operation.route.method, operation.route.path)
        for lacking in absent:
            self._paths.add(lacking, lacking.method, lacking.path)
        self._guard = Guard(self._serve, settings, requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection; there are no WebSockets here."""
        if scope["type"] == "http":
            await self._guard(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def drain(self, grace_seconds: float) -> None:
        """Let requests with an effect finish within the grace, then cancel them: their keys stay bound."""
        await self._desk.drain(grace_seconds)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.ExitStack() as until_sent:
            answer = await self._answer(scope, receive, until_sent)
            if isinstance(answer, Answer):
                await answer.send(send)
            elif answer is not None:
                await _deliver(answer, scope, receive, send)

    async def _answer(
        self, scope: Scope, receive: Receive, until_sent: contextlib.ExitStack
    ) -> Answer | Response | None:
        """The answer, also to what is wrong; None for a client that is gone."""
        try:
            operation, values = self._paths.find(scope["method"], scope["raw_path"].decode(errors="replace"))
            scope["devboxd.operation"] = operation.name
            if isinstance(operation, Absent):
                await authenticate(self._store, scope)
                raise operation.refusal()
            if operation.route.scope:
                await authenticate(self._store, scope)
            held = until_sent.enter_context(self.bounds.admit(scope.get("devboxd.key", "")))
            answer = await self._admitted(operation, values, scope, receive, held)
            if isinstance(answer, Answer) and len(answer.body) > WHOLE:
                held.take(len(answer.body))
            return answer
        except ApiError as error:
            return of_error(error)
        except OtherMethodError as error:
            return error.answer
        except ClientDisconnect:
            return None
        except Exception as error:
            return _fault(error)

    async def _admitted(
        self, operation: Operation, values: Sequence[str], scope: Scope, receive: Receive, held: Held
    ) -> Answer | Response:
        route = operation.route
        if route.path.startswith("/v1/") and (unready := self._ready()) is not None:
            raise await _sent_away(route, unready)
        if route.once:
            return await self._once(operation, values, scope, receive, held)
        body: Body = b""
        if route.method not in _BODYLESS and not route.streamed:
            body = await _read_body(operation, scope, receive, held)
        call = Call(scope.get("devboxd.account", ""), Request(scope, receive), Once(None, hashlib.sha256()))
        work = _perform(operation, call, values, body)
        return await (_while_there(receive, work) if route.waits else work)

    async def _once(
        self, operation: Operation, values: Sequence[str], scope: Scope, receive: Receive, held: Held
    ) -> Answer:
        route, account = operation.route, scope["devboxd.account"]
        headers: dict[bytes, bytes] = scope["devboxd.headers"]
        request_id = headers.get(b"x-request-id", b"")
        key = request_key(account, scope["method"], scope["path"], scope["query_string"], request_id)
        if route.streamed:
            stream = StreamFingerprint(receive, _boundary(headers), bodies.STALL_SECONDS)
            request = Request(scope, stream.receive)
            return await self._desk.answer(key, stream, _work(operation, values, account, request, [b""]))
        body = await _read_body(operation, scope, receive, held)
        big = len(body) > BIG_BYTES
        fingerprint = await asyncio.to_thread(hashlib.sha256, body) if big else hashlib.sha256(body)
        work = _work(operation, values, account, Request(scope, receive), [body])
        del body  # it is freed as soon as it is decoded
        return await self._desk.answer(key, fingerprint, work)


def _unready_error(unready: Unready | None) -> ApiError | None:
    if unready is None:
        return None
    return ApiError(503, f"cannot run commands now: {unready.reason}", retry_after=unready.retry_after)


async def _sent_away(route: Route, unready: Unready) -> ApiError:
    message = f"cannot serve now: {unready.reason}; ask again soon, /healthz tells when"
    if not route.waits:
        return ApiError(503, message, retry=True, retry_after=unready.retry_after)
    await asyncio.sleep(unready.hold_s)  # not a wait for something: so that the client does not spin
    return timed_out(message)


def _work(
    operation: Operation, values: Sequence[str], account: str, request: Request, body: list[Body]
) -> Callable[[Once], Awaitable[Answer]]:
    async def work(once: Once) -> Answer:
        return _whole(await _perform(operation, Call(account, request, once), values, body.pop()))

    return work


async def _perform(operation: Operation, call: Call, values: Sequence[str], body: Body) -> Answer | Response:
    """Call the handler; every error becomes an answer."""
    try:
        binding = operation.binding
        arguments = binding.arguments(call, values, call.request.scope["query_string"], body)
        del body
        result = await binding.handler(**arguments)
        return result if isinstance(result, Response) else of_value(result)
    except ApiError as error:
        return of_error(error)
    except ClientDisconnect:
        return of_error(timed_out("cannot finish the request: its body ended early; send it again"))
    except Exception as error:
        return _fault(error)


def _fault(error: Exception) -> Answer:
    """500 with the number of the traceback in the log, which leaves out the error's words: they may quote a body."""
    number = "err_" + secrets.token_hex(6)
    reason = error.strerror if isinstance(error, OSError) else None
    where = "".join(traceback.format_tb(error.__traceback__))
    _log.error("request.failed", error_id=number, error=type(error).__qualname__, reason=reason, traceback=where)
    return of_error(ApiError(500, f"cannot finish the request: a fault of the server, logged as {number}"))


def _whole(answer: Answer | Response) -> Answer:
    """An answer that can be given to several clients and be stored."""
    if isinstance(answer, Answer):
        return answer
    headers = tuple(pair for pair in answer.raw_headers if pair[0] != b"content-length")
    return Answer(answer.status_code, bytes(answer.body), headers)


async def _deliver(answer: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Send it; one that cannot be finished raises, which cuts the connection: the client sees an incomplete answer."""
    try:
        await answer(scope, receive, send)
    except (EOFError, TimeoutError) as error:  # its source ended before what was announced, or its reader is too slow
        _log.warning("request.cut", path=scope["path"][:200], reason=str(error) or "the client takes too long")
        raise
    except Exception as error:
        _fault(error)
        raise


async def _while_there(receive: Receive, work: Coroutine[Any, Any, Answer | Response]) -> Answer | Response:
    """The result of `work`, whose request has been read. Raises ClientDisconnect when the client leaves before."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_next(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _next(receive: Receive) -> Message:
    return await receive()


async def _read_body(operation: Operation, scope: Scope, receive: Receive, held: Held) -> Body:
    """The body of a request whose type is right. A web page can send any other type without asking first, so it is
    refused even where the body is ignored.
    """
    headers: dict[bytes, bytes] = scope["devboxd.headers"]
    if (encoding := headers.get(b"content-encoding", b"identity").strip().lower()) != b"identity":
        name = encoding[:32].decode("latin-1")
        raise ApiError(415, f"cannot read the body: its Content-Encoding {name!r} is not known; send it as it is")
    length = headers.get(b"content-length", b"")
    body = await bodies.read(receive, int(length) if length.isdigit() else None, operation.route.body_limit, held.take)
    if body and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "cannot read the body: its type is unknown; send it with `Content-Type: application/json`")
    return body


def _boundary(headers: dict[bytes, bytes]) -> bytes:
    request = Request({"type": "http", "headers": [(b"content-type", headers.get(b"content-type", b""))]})
    _, _, rest = request.headers["content-type"].partition("boundary=")
    return rest.split(";")[0].strip().strip('"').encode("latin-1")


async def _lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})
