"""Reading the body of a request as a whole."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
from collections.abc import Callable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from devboxd.errors import ApiError, timed_out

STALL_SECONDS = 60.0
"""A body that stands still for so long is given up."""
BIG_BYTES = 1 << 20
"""Larger bodies are worth some effort: memory in huge pages, work in threads."""

Body = bytes | mmap.mmap
"""What a body is read into; both are buffers with a length."""


async def read(receive: Receive, length: int | None, limit: int, take: Callable[[int], None]) -> Body:
    """The whole body, of which the client announced `length` bytes unless it sends chunks.

    `take` is told of each byte before it is held, and raises ApiError when there is no room.
    Raises ApiError 413 for one of more than `limit` bytes, 408 for one that stands still, and ClientDisconnect.
    """
    if length is not None and length > limit:
        raise _too_large(limit)
    if length is not None:
        take(length)
    message = await _next(receive)
    body: bytes = message.get("body", b"")
    if length is None:
        take(len(body))
    if not message.get("more_body"):
        if len(body) > limit:
            raise _too_large(limit)
        return body
    if length is not None and length > BIG_BYTES:
        return await _read_into(_pages(length), body, receive)
    parts, size = [body], len(body)
    while message.get("more_body"):
        message = await _next(receive)
        parts.append(message.get("body", b""))
        if length is None:
            take(len(parts[-1]))
        size += len(parts[-1])
        if size > limit:
            raise _too_large(limit)
    return b"".join(parts)


async def _read_into(pages: mmap.mmap, first: bytes, receive: Receive) -> mmap.mmap:
    pages.write(first)
    while pages.tell() < len(pages):
        message = await _next(receive)
        pages.write(message.get("body", b""))  # never too much: the HTTP below counts what was announced
        if not message.get("more_body"):
            break
    if pages.tell() < len(pages):
        raise ClientDisconnect
    return pages


def _pages(length: int) -> mmap.mmap:
    """Memory of this size, of which only what is written is taken; huge pages spare thousands of page faults."""
    pages = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


async def _next(receive: Receive) -> Any:
    try:
        async with asyncio.timeout(STALL_SECONDS):
            message = await receive()
    except TimeoutError:
        raise timed_out(
            f"cannot wait longer for the body: nothing came for {STALL_SECONDS:.0f} s; send it again"
        ) from None
    if message["type"] == "http.disconnect":
        raise ClientDisconnect
    return message


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"cannot take a body of more than {limit >> 20} MiB here; send less, or upload it as a file")
