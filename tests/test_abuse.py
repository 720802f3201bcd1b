"""Clients that take too much at once, read or write slowly, or vanish: everybody else is served, nothing is kept."""

from __future__ import annotations

import asyncio
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from support.api import Api
from support.raw import Raw, exchange, request, shut_streams
from support.server import Server
from support.until import until

pytestmark = [pytest.mark.box, pytest.mark.timeout(600)]

MIB = 1 << 20
SIZE = 500_000_000
CROWD = 1000
GONE = 60
"""How often a client of each kind vanishes."""


@pytest.fixture(scope="module")
def busy() -> Iterator[Server]:
    """A server for these tests alone: its memory and descriptors are counted."""
    server = Server()
    try:
        yield server.start()
    finally:
        server.stop()


@contextmanager
def within(server: Server, bound: int) -> Iterator[None]:
    """The server's memory never grows by more than `bound` bytes during the block."""
    before = most = server.memory()
    over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.02):
            most = max(most, server.memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    print(f"memory: {before / MIB:.1f} MiB, at most {(most - before) / MIB:.1f} more")
    assert most - before < bound, f"{(most - before) / MIB:.1f} MiB more than before"


# a thousand at once


def test_a_thousand_streams_and_a_thousand_waits_at_once(busy: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        with busy.api() as api:
            box = api.create()
            asyncio.run(_crowd(busy, api, box))  # what the first crowd leaves is kept ready for the next
            before, memory = busy.descriptors(), busy.memory()
            asyncio.run(_crowd(busy, api, box))
            until(lambda: busy.descriptors() <= before + 1, "descriptors come back")
            assert busy.memory() - memory < 16 * MIB
            api.shutdown(box)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def _crowd(server: Server, api: Api, box: str) -> None:
    """All streams get what is printed and end cleanly, all waits are answered with the end."""
    execution = api.start(box, "cat", attach_stdin=True)
    path = f"/v1/devboxes/{box}/executions/{execution}"
    files, memory = server.descriptors(), server.memory()
    streams = [await _opened(server) for _ in range(CROWD)]
    waits = [await _opened(server) for _ in range(CROWD)]
    for _, writer in streams:
        writer.write(request(server, "GET", path + "/stream_stdout_updates"))
    for reader, _ in streams:
        assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
    ends = [asyncio.ensure_future(_end(server, path, *wait)) for wait in waits]
    await asyncio.to_thread(api.send, box, execution, "to all\n")
    for reader, _ in streams:
        await reader.readuntil(b'data: {"output":"to all\\n","offset":0}\n\n')
    print(
        f"{CROWD} streams, {CROWD} waits: {server.descriptors() - files} descriptors, "
        f"{(server.memory() - memory) / MIB:.1f} MiB"
    )
    await asyncio.to_thread(api.send, box, execution, signal="EOF")
    assert [await end for end in ends] == ["completed"] * CROWD
    for reader, writer in streams:
        rest = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert b"error" not in rest
        writer.close()
    for _, writer in waits:
        writer.close()


async def _opened(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


async def _end(server: Server, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
    body = {"statuses": ["completed"], "timeout_seconds": 24}
    while True:
        status, view = await exchange(reader, writer, request(server, "POST", path + "/wait_for_status", body))
        if status == 200:
            return str(view["status"])
        assert status == 408, view


# slow ones


def test_slow_readers_of_a_stream_cost_no_memory(busy: Server) -> None:
    """One reads nothing, one a little now and then; the command and other clients do not wait for them."""
    with busy.api() as api:
        box = api.create()
        api.output(box, "true")
        with within(busy, 16 * MIB):
            execution = api.start(box, f"head -c {SIZE} /dev/zero | tr '\\0' x")
            path = f"/v1/devboxes/{box}/executions/{execution}/stream_stdout_updates"
            silent, slow = (Raw(busy, request(busy, "GET", path, connection="close")) for _ in range(2))
            _others_are_served(api, box, slow)
            assert api.wait(box, execution, 300)["exit_status"] == 0
            begun = silent.until(b'"output":"x').partition(b"\r\n\r\n")[2]
            assert begun.count(b"x") + silent.count(b"x") == SIZE
        slow.vanish()
        api.shutdown(box)


def test_slow_readers_of_a_file_cost_no_memory(busy: Server) -> None:
    with busy.api() as api:
        box = api.create()
        api.output(box, f"head -c {SIZE} /dev/zero | tr '\\0' x > large")
        path = f"/v1/devboxes/{box}/download_file"
        with within(busy, 16 * MIB):
            sent = request(busy, "POST", path, {"path": "large"}, connection="close")
            clients = [Raw(busy, sent) for _ in range(6)]
            _others_are_served(api, box, clients[0])
            assert SIZE - 100 * MIB < clients[0].count(b"x") < SIZE
        for client in clients:
            client.vanish()
        api.shutdown(box)


def test_a_slow_writer_of_a_file_holds_nobody_up(busy: Server) -> None:
    content = b"z" * 40_000
    form = b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\nslow\r\n--b\r\n'
    form += b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content + b"\r\n--b--\r\n"
    with busy.api() as api:
        box = api.create()
        kind = {"content_type": "multipart/form-data; boundary=b", "connection": "close"}
        sent = request(busy, "POST", f"/v1/devboxes/{box}/upload_file", form, **kind)
        with within(busy, 16 * MIB):
            client = Raw(busy)
            for start in range(0, len(sent), 200):
                client.socket.sendall(sent[start : start + 200])
                assert api.output(box, f"echo {start}") == f"{start}\n"
            assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        assert api.download(box, "slow") == content
        api.shutdown(box)


def _others_are_served(api: Api, box: str, slow: Raw) -> None:
    """Commands of another client, one after each few bytes that the slow one takes."""
    for number in range(100):
        assert slow.socket.recv(1024)
        assert api.output(box, f"echo {number}") == f"{number}\n"


def test_streams_without_a_key_that_take_nothing_hold_nobody_up(busy: Server) -> None:
    """12,000 of them ask for the largest page: others wait for the work of a moment, not of minutes."""
    asked = shut_streams("/docs", 60)
    with busy.api() as api:
        box = api.create()
        with within(busy, 128 * MIB):
            clients = [Raw(busy, asked) for _ in range(200)]
            assert api.http.get("/healthz", timeout=30).status_code == 200
            assert api.output(box, "echo fine") == "fine\n"
        for client in clients:
            client.vanish()
        assert api.http.get("/healthz", timeout=30).status_code == 200
        api.shutdown(box)


# those that vanish


def test_what_clients_held_that_vanish_comes_back(busy: Server) -> None:
    """Waits, streams, downloads, uploads and creates, cut in the middle, some hundred times."""
    with busy.api() as api:
        box = api.create()
        execution = api.start(box, "echo said; exec sleep 900")
        api.output(box, "head -c 50000000 /dev/zero > large")
        _vanish(busy, box, execution, 1)
        until(lambda: _settled(api), "boxes that nobody waits for any more are made, and shut down")
        before, memory = busy.descriptors(), busy.memory()
        _vanish(busy, box, execution, GONE)
        until(lambda: _settled(api), "boxes that nobody waits for any more are made, and shut down", 120)
        until(lambda: busy.descriptors() <= before + 1, "descriptors come back")
        assert busy.memory() - memory < 16 * MIB
        assert api.output(box, "ls -A | grep -c devboxd- || true") == "0\n", "no half of an upload stays"
        assert api.streamed(box, api.start(box, "echo fine")) == "fine\n"


def _vanish(server: Server, box: str, execution: str, times: int) -> None:
    path = f"/v1/devboxes/{box}"
    running = f"{path}/executions/{execution}"
    part = b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\nhalf\r\n--b\r\n'
    part += b'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + b"y" * 100_000
    upload = request(
        server, "POST", path + "/upload_file", part, content_type="multipart/form-data; boundary=b"
    ).replace(f"content-length: {len(part)}".encode(), b"content-length: 1000000")
    for _ in range(times):
        held = [
            Raw(server, request(server, "POST", running + "/wait_for_status", {"statuses": ["completed"]})),
            Raw(server, request(server, "POST", path + "/wait_for_status", {"statuses": ["shutdown"]})),
            Raw(server, upload),
            Raw(server, request(server, "POST", "/v1/devboxes/create_and_await_running", {})),
        ]
        stream = Raw(server, request(server, "GET", running + "/stream_stdout_updates"))
        stream.until(b"said")
        download = Raw(server, request(server, "POST", path + "/download_file", {"path": "large"}))
        download.until(b"\r\n\r\n")
        for client in (*held, stream, download):
            client.vanish()


def _settled(api: Api) -> bool:
    """Shut down what was created for nobody; whether all of it has ended."""
    living = [view for view in api.boxes() if view["status"] not in ("shutdown", "failure")]
    for view in living[:-1]:  # the oldest is the test's own
        api.shutdown(view["id"])
    return len(living) == 1
