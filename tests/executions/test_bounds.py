"""Bounds of a server: memory for stdin, open files for streams and transfers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.api import Api, Event
from support.server import PROGRAM, Server

pytestmark = pytest.mark.box

MIB = 1 << 20
OPEN_FILES = 1100
"""Leaves room for 25 streams: a quarter of what is above 1000."""


class Memory:
    """The most resident memory of a process during a block, and what it had before and after; in bytes."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/statm")
        self._over = threading.Event()
        self.before = self.most = self.after = self._now()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self.before = self.most = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        time.sleep(0.3)
        self.after = self._now()

    def _now(self) -> int:
        return int(self._status.read_text().split()[1]) * 4096

    def _watch(self) -> None:
        while not self._over.wait(0.005):
            self.most = max(self.most, self._now())


def test_memory_for_stdin_is_bounded(own_server: Server) -> None:
    """While a text is worked on it is there twice, as it came and as text; nothing else of it is kept."""
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "wc -c", attach_stdin=True)
        waiting = api.start(box, "sleep 600", attach_stdin=True)
        assert api.send(box, execution, "a" * 8 * MIB)
        with Memory(own_server.pid) as memory:
            for _ in range(8):
                assert api.send(box, execution, "b" * 8 * MIB)
            taken = [api.send(box, waiting, "c" * 8 * MIB) for _ in range(9)]
            for _ in range(500):
                assert api.send(box, execution, "d" * 1000)
        assert taken == [True] * 8 + [False]
        assert memory.most - memory.before < 20 * MIB
        assert memory.after - memory.before < 8 * MIB
        assert api.send(box, execution, signal="EOF")
        assert api.wait(box, execution)["stdout"].strip() == str(9 * 8 * MIB + 500_000)


@pytest.fixture
def short(tmp_path: Path) -> Server:
    """A server that may have few files open."""
    program = tmp_path / "devboxd"
    program.write_text(f'#!/bin/sh\nulimit -n {OPEN_FILES}\nexec "{PROGRAM}" "$@"\n')
    program.chmod(0o755)
    return Server(program)


def test_streams_and_transfers_leave_open_files_for_others(short: Server) -> None:
    limit = (OPEN_FILES - 1000) // 4
    try:
        short.start()
        with short.api() as api:
            box = api.create()
            execution = api.start(box, "echo said; sleep 600")
            before = short.descriptors()
            with ExitStack() as stack:
                held = [_opened(stack, short, box, execution) for _ in range(limit)]
                path = f"/v1/devboxes/{box}/executions/{execution}/stream_stdout_updates"
                message = api.refused("GET", path, 429)
                assert str(limit) in message
                assert "LimitNOFILE" in message
                api.refused("POST", f"/v1/devboxes/{box}/download_file", 429, {"path": "/etc/passwd"})
                assert api.output(box, "echo others") == "others\n"
                assert len(held) == limit
            deadline = time.monotonic() + 20
            while short.descriptors() > before + 5:
                assert time.monotonic() < deadline, "streams of clients that left stay open"
                time.sleep(0.1)
            assert b"root" in api.download(box, "/etc/passwd")
    finally:
        short.stop()


def _opened(stack: ExitStack, server: Server, box: str, execution: str) -> Iterator[Event]:
    """A stream that has begun; the iterator must be kept, for its end closes the connection."""
    api: Api = stack.enter_context(server.api())
    events = stack.enter_context(api.stream(box, execution))
    assert next(events).output == "said\n"
    return events
