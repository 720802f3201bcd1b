"""Small answers do not wait for the client: its kernel may keep an acknowledgement back for 40 ms."""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import pytest

from support.api import Api
from support.raw import request
from support.server import Server

pytestmark = pytest.mark.box

TIMES = 200
MOST = 40
"""How many times slower than a view of the devbox a small file may be, of which each read asks the box; a wait for an
acknowledgement is a hundred times."""


def seconds(server: Server, method: str, path: str, body: Any = None) -> list[float]:
    """Send a request again and again on one kept connection as ordinary clients do; the seconds of each."""
    sent = request(server, method, path, body)
    found = []
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with client.makefile("rb") as answers:
            for _ in range(TIMES):
                begun = time.perf_counter()
                client.sendall(sent)
                assert b" 200 " in answers.readline()
                length, line = -1, b""
                while line != b"\r\n":
                    line = answers.readline()
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                if length >= 0:
                    answers.read(length)
                else:
                    while size := int(answers.readline(), 16):
                        answers.read(size + 2)
                    answers.readline()
                found.append(time.perf_counter() - begun)
    return found


@pytest.mark.parametrize("size", [100, 1000, 20_000, 200_000])
@pytest.mark.parametrize("operation", ["read_file_contents", "download_file"])
def test_a_small_file_comes_as_fast_as_other_answers(
    server: Server, api: Api, box: str, operation: str, size: int
) -> None:
    api.output(box, f"head -c {size} /dev/zero | tr '\\0' x > small")
    _compare(server, box, operation, "small")


def test_a_file_of_procfs_comes_as_fast_as_other_answers(server: Server, box: str) -> None:
    """Its size is not known before it was read: head and body are two writes."""
    _compare(server, box, "read_file_contents", "/proc/self/status")


def _compare(server: Server, box: str, operation: str, path: str) -> None:
    view = statistics.median(seconds(server, "GET", f"/v1/devboxes/{box}"))
    named = {"file_path": path, "path": path}
    read = statistics.median(seconds(server, "POST", f"/v1/devboxes/{box}/{operation}", named))
    print(f"{operation} {path}: {read * 1000:.2f} ms, view {view * 1000:.2f} ms")
    assert read < MOST * view
