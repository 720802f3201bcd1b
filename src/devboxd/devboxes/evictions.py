"""Evictions: the hosted service announces when it will take a devbox away. This server never does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Annotated

import msgspec
from starlette.responses import Response

from devboxd.concurrency.waits import wait
from devboxd.http.operation import Call
from devboxd.http.streams import HEARTBEAT_S, Closing, EndedEarlyError, Places, events


class EvictionView(msgspec.Struct, frozen=True):
    """A devbox that will be suspended, and when, in Unix milliseconds."""

    devbox_id: str
    """The devbox. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`"""
    eviction_deadline_ms: int
    """When it will be suspended, in Unix milliseconds. Example: `1764352800000`"""


async def watch_evictions(
    closing: Closing, places: Places, call: Call
) -> Annotated[Response, "text/event-stream", "text/plain", EvictionView, 429]:
    """A stream of events without any: no devbox is ever evicted here. It lasts until the server stops.

    Published clients ask for it as text/event-stream or as application/json; who accepts neither gets an empty text.

    ```python
    for eviction in client.devboxes.watch_evictions():
        print(eviction.devbox_id)
    ```
    """
    accepted = (call.request.headers.get("accept") or "*/*").lower()
    if not any(kind in accepted for kind in ("text/event-stream", "application/json", "*/*")):
        return Response(media_type="text/plain")
    return events(_none(closing), places)


async def _none(closing: Closing) -> AsyncGenerator[tuple[EvictionView, ...], None]:
    event = asyncio.Event()
    with closing.waking(event):
        while not closing.begun:
            yield ()
            await wait(event, HEARTBEAT_S)
    raise EndedEarlyError("cannot go on with this stream: the server stops; open it again")
