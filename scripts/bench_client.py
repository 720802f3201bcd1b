"""A client for benchmarks that costs next to nothing, because it shares the processors with what it measures."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

_BLOCK = 1 << 20


def request(port: int, key: str, method: str, path: str, body: Any = None) -> bytes:
    """The bytes of one HTTP/1.1 request; a POST has an x-request-id, as the published clients send it."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"host: 127.0.0.1:{port}", f"authorization: Bearer {key}"]
    if method != "GET":
        lines += [f"x-request-id: {uuid.uuid4()}", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode() + data


def execute(command: str = "true") -> dict[str, str]:
    """The body of `execute`, as the published clients send it."""
    return {"command": command, "command_id": str(uuid.uuid4())}


class Line:
    """One keep-alive connection, used by one request after the other."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._left = b""

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, method: str, path: str, body: Any = None) -> bytes:
        """Send a request and return the body of its answer, which must be 200."""
        return self.exchange(request(self._port, self._key, method, path, body))

    def exchange(self, data: bytes) -> bytes:
        """The same for the bytes of a request."""
        self._socket.sendall(data)
        length = self._head()
        parts, have = [self._left], len(self._left)
        while have < length:
            parts.append(self._more())
            have += len(parts[-1])
        whole = b"".join(parts)
        self._left = whole[length:]
        return whole[:length]

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The same, decoded."""
        return json.loads(self.call(method, path, body))

    def events(self, path: str) -> Iterator[bytes]:
        """The bytes of a streamed answer as they come, until its end; the connection cannot be used afterwards."""
        self._socket.sendall(request(self._port, self._key, "GET", path))
        self._head()
        block, last = self._left, b""
        while not last.endswith(b"0\r\n\r\n"):
            if block:
                yield block
                last = (last + block)[-5:]
            if last.endswith(b"0\r\n\r\n"):
                return
            block = self._more()

    def _head(self) -> int:
        while (end := self._left.find(b"\r\n\r\n")) < 0:
            self._left += self._more()
        head, self._left = self._left[:end].lower(), self._left[end + 4 :]
        if not head.startswith(b"http/1.1 200"):
            raise RuntimeError(f"cannot go on: the server answered {head!r} {self._left[:500]!r}")
        lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"content-length:")]
        return int(lengths[0]) if lengths else 0

    def _more(self) -> bytes:
        block = self._socket.recv(_BLOCK)
        if not block:
            raise RuntimeError("cannot go on: the server closed the connection")
        return block


async def together(port: int, key: str, paths: Iterator[tuple[str, Any]], lines: int) -> list[Any]:
    """POST all (path, body) over this many connections at once; the decoded answers, in any order."""
    answers: list[Any] = []

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            for path, body in paths:
                writer.write(request(port, key, "POST", path, body))
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                at = head.index(b"content-length:") + 15
                answer = await reader.readexactly(int(head[at : head.index(b"\r", at)]))
                if not head.startswith(b"http/1.1 200"):
                    raise RuntimeError(f"cannot go on: the server answered {head!r} {answer!r}")
                answers.append(json.loads(answer))
        finally:
            writer.close()

    await asyncio.gather(*(work() for _ in range(lines)))
    return answers


def times(action: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of `count` calls, sorted."""
    found = []
    for _ in range(count):
        begun = time.perf_counter()
        action()
        found.append((time.perf_counter() - begun) * 1000)
    return sorted(found)


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of the sorted values lies."""
    return values[min(len(values) - 1, int(len(values) * share))]
