"""Answers that take their time: server-sent events and held answers, both ended in order when the server stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

import msgspec
from prometheus_client.metrics_core import Metric
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from devboxd.errors import ApiError
from devboxd.http.answer import Error
from devboxd.metrics import gauge

HELD_S = 24.0
"""Longest time an answer is held: clients give up on a request after 30 s, some after 25."""
HEARTBEAT_S = 10.0
"""Longest silence in a stream of events; proxies and clients cut quieter ones."""

_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


class Closing:
    """Tells held answers and streams that the server stops, so that none holds it up."""

    def __init__(self) -> None:
        self.begun = False
        self._events: set[asyncio.Event] = set()

    @contextmanager
    def waking(self, event: asyncio.Event) -> Iterator[None]:
        """Set `event` when the server begins to stop, at once when it has, while the block lasts."""
        self._events.add(event)
        if self.begun:
            event.set()
        try:
            yield
        finally:
            self._events.discard(event)

    def begin(self) -> None:
        """From now on waits end early."""
        self.begun = True
        for event in self._events:
            event.set()


class EndedEarlyError(Exception):
    """A stream that ends for another reason than its completion; the client is told to open it again."""


class Places:
    """Bounds how many answers and uploads that take their time have files open, so that none are left for others."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def collect(self) -> Iterator[Metric]:
        """The metrics of the places."""
        yield gauge("devboxd_streams_open", "Streams and file transfers that are open", {(): self.taken})
        yield gauge("devboxd_streams_limit", "How many may be open", {(): self.limit})

    def check(self) -> None:
        """Raise 429 that names the limit when no place is free."""
        if self.taken >= self.limit:
            raise ApiError(
                429,
                f"cannot open another stream: {self.limit} streams and file transfers are open, the limit that follows "
                "from the number of open files of the server (LimitNOFILE); close some",
            )

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Hold a place while the block lasts. Raises 429 when none is free."""
        self.check()
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1


class Lasting(StreamingResponse):
    """A streamed answer that holds a place, and closes its source however it ends: also when it never began."""

    def __init__(
        self, source: AsyncGenerator[bytes, None], places: Places, media_type: str, headers: dict[str, str]
    ) -> None:
        places.check()
        super().__init__(source, media_type=media_type, headers=headers)
        self._source = source
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; to HEAD its head, without a beginning of the source."""
        async with aclosing(self._source):
            if scope["method"] == "HEAD":
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                return
            with self._places.taking():
                await super().__call__(scope, receive, send)


def events(source: AsyncGenerator[tuple[msgspec.Struct, ...], None], places: Places) -> Lasting:
    """Send the items of each tuple as events in one write, an empty one as a comment that keeps the connection awake.

    A source that raises EndedEarlyError ends with `event: error` and code 408, which published clients answer by
    opening the stream again. There are no `id:` lines: with comments between them they confuse the Python clients.
    Raises 429 when no place is free.
    """
    return Lasting(_encoded(source), places, "text/event-stream", _HEADERS)


async def _encoded(source: AsyncGenerator[tuple[msgspec.Struct, ...], None]) -> AsyncGenerator[bytes, None]:
    try:
        async with aclosing(source):
            async for items in source:
                lines = [b"data: " + msgspec.json.encode(item) + b"\n\n" for item in items]
                yield b"".join(lines) or b": keep-alive\n\n"
    except EndedEarlyError as error:
        body = msgspec.json.encode(Error(408, str(error)))
        yield b"event: error\ndata: " + body + b"\n\n"
