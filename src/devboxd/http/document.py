"""A document that needs no key: rendered once, kept as ready bytes, sent to few readers at a time."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from devboxd.errors import ApiError
from devboxd.http.answer import send_pieces

READERS = 64
"""How many may be sent documents at once: each holds one in memory until the client has taken it."""
PATIENCE_S = 30.0
"""How long a client may take for a document."""
RETRY_S = 1


class Readers:
    """Counts who waits for documents or is being sent them."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place while the block lasts. Raises ApiError 503 when none is free."""
        if self.count >= READERS:
            text = f"cannot send this now: {READERS} clients are reading; ask again soon"
            raise ApiError(503, text, retry=True, retry_after=RETRY_S)
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1


class Document:
    """Bytes that are rendered at the first request, in a thread, and kept, also compressed."""

    def __init__(self, render: Callable[[], bytes], kind: str, readers: Readers, headers: Mapping[str, str]) -> None:
        self._render = render
        self._kind = kind
        self._readers = readers
        self._headers = headers
        self._made: asyncio.Future[tuple[bytes, bytes, str]] | None = None

    def _make(self) -> tuple[bytes, bytes, str]:
        content = self._render()
        return content, gzip.compress(content, mtime=0), hashlib.sha256(content).hexdigest()[:32]

    async def answer(self, asked: Mapping[bytes, bytes]) -> Response:
        """The document as these headers ask for it: 304 for one that is known. Raises ApiError 503."""
        if self._made is None:
            self._made = asyncio.ensure_future(asyncio.to_thread(self._make))
        with self._readers.place():  # the next one is taken by the sending, with nothing awaited between
            content, packed, digest = await asyncio.shield(self._made)
        compressed = b"gzip" in asked.get(b"accept-encoding", b"")
        tag = f'"{digest}{"-gzip" if compressed else ""}"'
        headers = {**self._headers, "etag": tag, "vary": "accept-encoding", "cache-control": "no-cache"}
        if tag.encode() in asked.get(b"if-none-match", b""):
            return Response(status_code=304, headers=headers)
        if compressed:
            return _Sent(packed, self._kind, self._readers, {**headers, "content-encoding": "gzip"})
        return _Sent(content, self._kind, self._readers, headers)


class _Sent(Response):
    def __init__(self, content: bytes, kind: str, readers: Readers, headers: Mapping[str, str]) -> None:
        super().__init__(content, media_type=kind, headers=headers)
        self._readers = readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it. Raises TimeoutError when the client does not take it in time."""
        with self._readers.place():
            async with asyncio.timeout(PATIENCE_S):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send_pieces(bytes(self.body), send)
