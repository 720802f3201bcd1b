"""Clients at the level of bytes: slow to read, slow to write, gone in the middle, or a thousand at once."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from typing import Any

from hpack import Encoder

from support.server import Server


def request(server: Server, method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """A whole request of HTTP/1.1 with the server's key; `body` is JSON, or bytes as they are."""
    content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    lines = {
        "host": "localhost",
        "authorization": f"Bearer {server.key}",
        "content-type": "application/json",
        "content-length": str(len(content)),
        **{name.replace("_", "-"): value for name, value in headers.items()},
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def shut_streams(path: str, number: int) -> bytes:
    """The begin of a HTTP/2 connection without a key that asks on many streams and takes no byte of an answer."""
    names = [(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", "localhost")]
    asked = b"".join(_frame(1, 5, 2 * at + 1, Encoder().encode(names)) for at in range(number))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, struct.pack(">HI", 4, 0)) + asked


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


class Raw:
    """A connection that receives only what is asked for: the kernel keeps little more for it."""

    def __init__(self, server: Server, sent: bytes = b"") -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(120)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.sendall(sent)

    def until(self, mark: bytes) -> bytes:
        """What comes, until `mark` is in it; fails when the connection ends before."""
        seen = b""
        while mark not in seen:
            piece = self.socket.recv(4096)
            assert piece, f"the connection ended after {seen[-500:]!r}"
            seen += piece
        return seen

    def count(self, byte: bytes) -> int:
        """How often a byte comes until the answer, which must be chunked or the last, has ended."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        found, buffer = 0, bytearray(1 << 20)
        while size := self.socket.recv_into(buffer):
            found += buffer.count(byte, 0, size)
        return found

    def vanish(self) -> None:
        """Break the connection as a machine does that loses its power and comes back."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes) -> tuple[int, Any]:
    """One request on a connection that stays; the status and the JSON of the answer."""
    writer.write(sent)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    return int(head.split()[1]), json.loads(await reader.readexactly(length))
