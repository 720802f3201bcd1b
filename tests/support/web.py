"""An application with a small table of its own, to be called over ASGI or served."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
from starlette.responses import Response, StreamingResponse

from devboxd.config import Settings
from devboxd.errors import bad_request, timed_out
from devboxd.http.operation import Application, Call, Route, Unready, build
from devboxd.resources import accounts
from devboxd.store.db import Store


class Inner(msgspec.Struct):
    size: int = 1
    label: str | None = None


class Body(msgspec.Struct):
    command: str
    count: int = 3
    seconds: float | None = None
    kind: Literal["a", "b"] = "a"
    inner: Inner | None = None


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    name: str = ""


class View(msgspec.Struct):
    thing_id: str
    command: str
    count: int
    times: int


class Things:
    """Things that requests make; `times` counts how often, gates hold the handlers at will."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.times = 0
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.gate.set()
        self.fail: Exception | None = None
        self.resumed: list[str | None] = []
        self.uploads: list[bytes] = []
        self.left = asyncio.Event()

    async def make(self, call: Call, command: str, *, answer: bytes | None = None) -> str:
        self.resumed.append(call.once.ref)
        if call.once.ref is not None:
            return call.once.ref
        self.entered.set()
        await self.gate.wait()
        self.times += 1
        ref = f"thing_{self.times}"
        await self.store.write(lambda connection: call.once.bind(connection, ref, answer))
        if self.fail is not None:
            raise self.fail
        return ref


async def make(things: Things, call: Call, body: Body) -> View:
    """Make a thing.

    A second line for the description.
    """
    ref = await things.make(call, body.command)
    return View(ref, body.command, body.count, things.times)


async def make_with_answer(things: Things, call: Call, body: Body) -> View:
    """Make a thing whose answer is stored with it."""
    view = View("thing_x", body.command, body.count, 1)
    await things.make(call, body.command, answer=msgspec.json.encode(view))
    return view


async def unbound(things: Things, body: Body | None = None) -> None:
    """Do something that has no reference."""
    things.entered.set()
    await things.gate.wait()
    things.times += 1
    if things.fail is not None:
        raise things.fail


async def large(things: Things, call: Call, size: int = 100) -> Response:
    """Answer with many bytes and a header."""
    await things.make(call, "large")
    return Response(b"x" * size, media_type="text/plain", headers={"x-size": str(size)})


async def upload(things: Things, call: Call) -> Response:
    """Take a body as it comes."""
    parts = [part async for part in call.request.stream()]
    things.times += 1
    things.uploads.append(b"".join(parts))
    digest = hashlib.sha256(things.uploads[-1]).hexdigest()
    return Response(b"{}", media_type="application/json", headers={"x-sha256": digest})


async def wait_for(things: Things, thing_id: str) -> dict[str, str]:
    """Wait for a thing."""
    things.entered.set()
    try:
        await things.gate.wait()
    except asyncio.CancelledError:
        things.left.set()
        raise
    return {"thing_id": thing_id}


async def look(
    thing_id: str,
    limit: int = 20,
    ratio: float = 0.5,
    deep: bool = False,
    name: str | None = None,
    kind: Literal["a", "b"] | None = None,
) -> dict[str, Any]:
    """Look at a thing."""
    return {"thing_id": thing_id, "limit": limit, "ratio": ratio, "deep": deep, "name": name, "kind": kind}


async def need(word: str) -> dict[str, str]:
    """Want a parameter."""
    return {"word": word}


async def strict(body: Strict) -> Strict:
    """Forbid unknown fields."""
    return body


async def fault(call: Call) -> None:
    """Break, with a word in the error that no log may show."""
    raise ValueError(call.request.headers["x-word"])


async def refuse(retry: str = "") -> None:
    """Refuse."""
    raise timed_out("cannot wait longer: ask again") if retry else bad_request("cannot do that: never")


async def stream(broken: bool = False) -> Response:
    """Stream a little."""

    async def pieces() -> AsyncIterator[bytes]:
        yield b"one"
        if broken:
            raise RuntimeError("the file shrank")
        yield b"two"

    return StreamingResponse(pieces())


async def events(call: Call) -> Response:
    """Stream until the client leaves."""

    async def pieces() -> AsyncIterator[bytes]:
        while True:
            yield b": still here\n\n"
            await asyncio.sleep(0.02)

    return StreamingResponse(pieces(), media_type="text/event-stream")


async def word() -> dict[str, str]:
    """Answer on a word where others have an id."""
    return {"word": "yes"}


ROUTES = (
    Route("GET", "/v1/accounts/me", accounts.me, "account:read"),
    Route("POST", "/v1/things", make, "things:write", once=True),
    Route("POST", "/v1/things/with_answer", make_with_answer, "things:write", once=True),
    Route("POST", "/v1/unbound", unbound, "things:write", once=True),
    Route("POST", "/v1/large", large, "things:write", once=True),
    Route("POST", "/v1/upload", upload, "things:write", once=True, streamed=True),
    Route("GET", "/v1/things/{thing_id}", look, "things:read"),
    Route("POST", "/v1/things/{thing_id}/wait_for_status", wait_for, "things:read", waits=True),
    Route("POST", "/v1/strict", strict, "things:write", body_limit=1000),
    Route("GET", "/v1/need", need, "things:read"),
    Route("POST", "/v1/things/word", word, "things:write"),
    Route("GET", "/v1/fault", fault, "things:read"),
    Route("GET", "/v1/refuse", refuse, "things:read"),
    Route("GET", "/v1/stream", stream, "things:read"),
    Route("GET", "/v1/events", events, "things:read"),
)


class Web:
    """The application, its store and a client that has a key."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.unready: Unready | None = None
        self.open()

    def open(self) -> None:
        """A new application on the same store, as after a restart."""
        self.store = Store.open(self.path)
        self.things = Things(self.store)
        services = [self.store, self.things]
        self.app: Application = build(
            ROUTES, services, store=self.store, settings=self.settings, ready=lambda: self.unready
        )

    async def client(self, key: str | None = None, **options: Any) -> httpx.AsyncClient:
        """A client with this key, or with a new one."""
        key = await accounts.create_key(self.store, "test") if key is None else key
        options.setdefault("base_url", "http://localhost")
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, headers={"authorization": f"Bearer {key}"}, **options)
