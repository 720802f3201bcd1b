"""A finished answer: status, headers and body as they go over the wire, and may be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Send

from devboxd.errors import ApiError

Headers = tuple[tuple[bytes, bytes], ...]

WHOLE = 64 << 10
"""Longer bodies go out in pieces: the HTTP below takes a whole one at once, however slow its client reads."""
_PIECES = 8
"""Of which it takes five ahead: a client that reads nothing keeps the rest, and so the request, here."""

JSON: Headers = ((b"content-type", b"application/json"),)
_RETRY: dict[bool, Headers] = {
    True: (*JSON, (b"x-should-retry", b"true")),
    False: (*JSON, (b"x-should-retry", b"false")),
}
_encode = msgspec.json.Encoder().encode


class Error(msgspec.Struct, frozen=True):
    """What every answer other than success carries."""

    code: int
    """The status of HTTP once more. Example: `404`"""
    message: str
    """What cannot be done, why, and what to do instead, in one sentence for a person.

    Example: `"cannot find the devbox dbx_0BwT25a4ESR05DXUEbW3kZ; check the id and the account of the key"`
    """


@dataclass(frozen=True, slots=True)
class Answer:
    """`headers` are all but content-length, which is the length of `body`."""

    status: int
    body: bytes
    headers: Headers = JSON

    async def send(self, send: Send) -> None:
        """Send the whole answer."""
        length = (b"content-length", str(len(self.body)).encode())
        await send({"type": "http.response.start", "status": self.status, "headers": [*self.headers, length]})
        if len(self.body) <= WHOLE:
            await send({"type": "http.response.body", "body": self.body})
        else:
            await send_pieces(self.body, send)


async def send_pieces(body: bytes, send: Send) -> None:
    """Send a body that has bytes, and return when the last of its pieces is on its way."""
    size = -(-len(body) // _PIECES)
    for start in range(0, len(body), size):
        more = start + size < len(body)
        await send({"type": "http.response.body", "body": body[start : start + size], "more_body": more})


EMPTY = Answer(200, b"{}")


def of_value(value: Any) -> Answer:
    """200 with the JSON of a Struct (or any value that msgspec encodes); None is the empty object."""
    return EMPTY if value is None else Answer(200, _encode(value))


def of_error(error: ApiError) -> Answer:
    """The error's code with {"code", "message"}; `x-should-retry` and `retry-after` when the error decides them."""
    headers = JSON if error.retry is None else _RETRY[error.retry]
    if error.code == 401:
        headers = (*headers, (b"www-authenticate", b"Bearer"))
    if error.retry_after is not None:
        headers = (*headers, (b"retry-after", str(error.retry_after).encode()))
    return Answer(error.code, _encode(Error(error.code, error.message)), headers)
