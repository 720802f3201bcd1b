"""The wall clock jumps: lives end by it, and nothing else takes notice. The clock is the one thing that is faked."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from support.reader import Reader
from support.server import Server

pytestmark = pytest.mark.box
HOUR_S = 3600
_PROGRAM = """#!{python}
import time
from pathlib import Path
real, ahead = time.time_ns, Path({ahead!r})
time.time_ns = lambda: real() + int(ahead.read_text())
from devboxd.cli import main
main()
"""


class Clock:
    """The wall clock of a server, which a test may set while it runs."""

    def __init__(self, folder: Path) -> None:
        self._ahead = folder / "nanoseconds-ahead"
        self.set(0)
        self.program = folder / "devboxd"
        self.program.write_text(_PROGRAM.format(python=sys.executable, ahead=str(self._ahead)))
        self.program.chmod(0o755)

    def set(self, seconds_ahead: int) -> None:
        """Let the clock be so much ahead of the real one from now on."""
        new = self._ahead.with_suffix(".new")
        new.write_text(str(seconds_ahead * 10**9))
        new.replace(self._ahead)


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def server(clock: Clock) -> Iterator[Server]:
    server = Server(clock.program)
    try:
        yield server.start()
    finally:
        server.stop()


def _wait_in_vain(server: Server, box: str, seconds: float) -> tuple[httpx.Response, float]:
    """A wait for what does not come: the answer, and how long it took."""
    begun = time.monotonic()
    with server.api() as api:
        body = {"statuses": ["suspended"], "timeout_seconds": seconds}
        return api.http.post(f"/v1/devboxes/{box}/wait_for_status", json=body), time.monotonic() - begun


def test_an_hour_forward_ends_the_boxes_whose_time_has_passed_and_only_those(server: Server, clock: Clock) -> None:
    with server.api() as api, ThreadPoolExecutor(1) as side:
        short = api.create(launch_parameters={"keep_alive_time_seconds": HOUR_S // 2})
        long = api.create(launch_parameters={"keep_alive_time_seconds": 2 * HOUR_S})
        cut = api.start(short, "echo before; sleep 1000")
        goes_on = api.start(long, "echo before; read line; echo $line; exit 3", attach_stdin=True)
        Reader(server, short, cut).until(lambda r: r.text == "before\n")
        held = side.submit(_wait_in_vain, server, long, 2)
        clock.set(HOUR_S)
        view = api.wait_box(short, "shutdown")
        assert view["shutdown_reason"] == "keep_alive_timeout"
        assert view["end_time_ms"] - view["create_time_ms"] >= HOUR_S * 1000
        ended = api.wait(short, cut)
        assert (ended["exit_status"], ended["stdout"]) == (137, "before\n")
        answer, took = held.result()
        assert (answer.status_code, took >= 2) == (408, True), "a wait is as long as it was asked to be"
        assert api.box(long)["status"] == "running"
        server.restart()
    with server.api() as api:
        assert api.box(long)["status"] == "running"
        assert api.send(long, goes_on, "after\n")
        view = api.wait(long, goes_on)
        assert (view["exit_status"], view["stdout"]) == (3, "before\nafter\n")
        assert api.output(api.create(), "echo new") == "new\n"


def test_an_hour_back_breaks_nothing(server: Server, clock: Clock) -> None:
    request = {"headers": {"x-request-id": str(uuid.uuid4())}}
    with server.api() as api:
        old = api.call("POST", "/v1/devboxes", {"name": "old"}, **request)["id"]
        api.wait_box(old, "running")
        before = [api.run(old, f"echo {n}")["execution_id"] for n in range(3)]
        clock.set(-HOUR_S)
        after = [api.run(old, f"echo {n}")["execution_id"] for n in range(3)]
        assert [*before, *after] == sorted({*before, *after}), "later ids are greater, whatever the clock says"
        assert api.call("POST", "/v1/devboxes", {"name": "old"}, **request)["id"] == old
        short = api.create(name="short", launch_parameters={"keep_alive_time_seconds": 2})
        answer, took = _wait_in_vain(server, old, 0.5)
        assert (answer.status_code, took >= 0.5) == (408, True)
        assert api.wait_box(short, "shutdown")["shutdown_reason"] == "keep_alive_timeout"
        assert [view["id"] for view in api.boxes()] == [short, old], "newest first"
        assert api.box(short)["create_time_ms"] < api.box(old)["create_time_ms"], "the clock was set back"
        server.restart()
    with server.api() as api:
        assert api.call("POST", "/v1/devboxes", {"name": "old"}, **request)["id"] == old
        assert api.box(old)["status"] == "running"
        assert [api.execution(old, one)["exit_status"] for one in [*before, *after]] == [0] * 6
        assert api.output(old, "echo on") == "on\n"
        new = api.create()
        assert sorted(view["id"] for view in api.boxes()) == sorted([old, short, new])
