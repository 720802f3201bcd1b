"""The application behind Granian on a real socket, and a client of HTTP/2 with prior knowledge."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import h2.config
import h2.connection
import h2.events
from granian.constants import HTTPModes, Interfaces
from granian.server.embed import Server

from devboxd.resources import accounts
from support.web import Web


@asynccontextmanager
async def served(web: Web) -> AsyncIterator[tuple[int, str]]:
    """The port of a running server and a key; when the block ends the server must end, too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Server(
        web.app, address="127.0.0.1", port=port, interface=Interfaces.ASGINL, http=HTTPModes.auto, websockets=False,
        backlog=2048, backpressure=4096, log_enabled=False,
    )  # fmt: skip
    serving = asyncio.ensure_future(server.serve())
    while True:
        with suppress(OSError):
            (await asyncio.open_connection("127.0.0.1", port))[1].close()
            break
        await asyncio.sleep(0.01)
    try:
        yield port, await accounts.create_key(web.store, "granian")
    finally:
        server.stop()  # type: ignore[no-untyped-call]
        await asyncio.wait_for(serving, 5)


class Http2:
    """One HTTP/2 connection with prior knowledge, as the npm client opens it on plain http."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.connection = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, header_encoding="utf-8", validate_outbound_headers=False)
        )

    async def __aenter__(self) -> Http2:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.connection.initiate_connection()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    def send(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes = b"") -> int:
        stream: int = self.connection.get_next_available_stream_id()
        pseudo = [(":method", method), (":scheme", "http"), (":path", path)]
        self.connection.send_headers(stream, pseudo + headers, end_stream=not body)
        if body:
            self.connection.send_data(stream, body, end_stream=True)
        self.writer.write(self.connection.data_to_send())
        return stream

    async def answers(self, streams: list[int]) -> dict[int, tuple[int, bytes]]:
        """Status and body of each of these streams."""
        status: dict[int, int] = {}
        bodies = dict.fromkeys(streams, b"")
        open_streams = set(streams)
        async with asyncio.timeout(10):
            while open_streams:
                for event in self.connection.receive_data(await self.reader.read(65536)):
                    if isinstance(event, h2.events.ResponseReceived):
                        status[event.stream_id] = int(dict(event.headers)[":status"])
                    elif isinstance(event, h2.events.DataReceived):
                        bodies[event.stream_id] += event.data
                        self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                        open_streams.discard(event.stream_id)
                self.writer.write(self.connection.data_to_send())
        return {stream: (status[stream], bodies[stream]) for stream in streams}


def named(key: str, host: str = "localhost") -> list[tuple[str, str]]:
    return [(":authority", host), ("authorization", f"Bearer {key}"), ("content-type", "application/json")]
