"""What is shown of journals: the last lines of a view, and the chunks of a stream. Bytes in, text out."""

from __future__ import annotations

import base64
import codecs
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from devboxd.errors import bad_request
from devboxd.executions.journals import BLOCK, Reader
from devboxd.executions.views import Chunk
from devboxd.http.streams import EndedEarlyError

VIEW_BYTES = 1 << 20
"""Most bytes of one stream that a view carries."""
DEFAULT_LINES = 100


def lines_wanted(last_n: str | None) -> int:
    """How many last lines a view shall carry. Raises 400 for anything but a whole number from 0."""
    if last_n is None or last_n == "":
        return DEFAULT_LINES
    if last_n.isascii() and last_n.isdigit() and len(last_n) <= 9:
        return int(last_n)
    raise bad_request(f"cannot use {last_n[:64]!r} as last_n: a whole number of lines, such as 100")


def tail(reader: Reader, length: int, lines: int | None) -> tuple[str, bool]:
    """The last `lines` lines (None: as many as fit) of the first `length` bytes, and whether anything was left out."""
    first = max(0, length - VIEW_BYTES)
    start = length
    data = b""
    while start > first and (lines is None or data.count(b"\n") <= lines):
        before = max(first, start - (BLOCK if lines is not None else VIEW_BYTES))
        data = reader.read_all(before, start) + data
        start = before
    cut = 0
    if start > 0:
        newline = data.find(b"\n", 0, min(len(data) - 1, BLOCK))  # the one at the very end begins no line
        cut = newline + 1 or _boundary(data)  # of a line that is longer the end is shown, too
    if lines is not None:
        cut = max(cut, _last_lines(data, lines))
    return data[cut:].decode("utf-8", "replace"), start > 0 or cut > 0


def _last_lines(data: bytes, lines: int) -> int:
    """Where the last `lines` lines begin; a newline at the very end ends a line and begins none."""
    position = len(data) - 1 if data.endswith(b"\n") else len(data)
    if lines == 0:
        return len(data)
    for _ in range(lines):
        position = data.rfind(b"\n", 0, position)
        if position < 0:
            return 0
    return position + 1


def _boundary(data: bytes) -> int:
    """The first byte that begins a character of UTF-8."""
    return next((i for i in range(min(4, len(data))) if data[i] & 0xC0 != 0x80), 0)


def whole_characters(data: bytes, final: bool) -> tuple[str, int]:
    """Decode `data`; unless `final`, a character that is cut off at the end is left for later.

    Returns the text and the number of bytes that it took. Bytes that are not UTF-8 appear as U+FFFD and count.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(data, final)
    pending: Any = decoder.getstate()[0]
    return text, len(data) - len(pending)


async def follow(
    reader: Reader,
    offset: int,
    ended_at: Callable[[], int | None],
    more: Callable[[], Awaitable[bool]],
    stopping: Callable[[], bool],
    as_bytes: bool = False,
) -> AsyncGenerator[tuple[Chunk, ...], None]:
    """Chunks from byte `offset` until the execution has completed and everything was sent.

    `ended_at` gives the length at which to stop once the execution has completed, None before. `more` waits for more
    and tells whether it came; if not, an empty tuple goes out, a heartbeat. With each chunk goes an empty one that
    names the position after it: published clients open a cut stream again at the offset of the last chunk that they
    saw, and so lose and double nothing. Raises EndedEarlyError once `stopping` and not everything was sent.
    """
    position = offset
    end: int | None = None
    while True:
        if end is None:
            end = ended_at()
        if stopping() and (end is None or position < end):
            raise EndedEarlyError("cannot go on with this stream: the server stops; open it again")
        data = reader.read(position, BLOCK if end is None else min(BLOCK, end - position))
        if as_bytes:
            chunk, used = Chunk("", position, base64.b64encode(data).decode()), len(data)
        else:
            text, used = whole_characters(data, final=end is not None and position + len(data) >= end)
            chunk = Chunk(text, position)
        if used:
            yield chunk, Chunk("", position + used)
            position += used
        elif end is not None:
            return
        elif not await more():
            yield ()
