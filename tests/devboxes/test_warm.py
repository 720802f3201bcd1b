"""Boxes made ahead: a devbox that takes one is like any other, and nobody else's box is ever lost or left."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from support.server import Server

pytestmark = pytest.mark.box


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(warm_boxes="2")
    try:
        yield server.start()
    finally:
        server.stop()


def waiting(server: Server, number: int) -> set[str]:
    """The boxes that are whole, once there are so many."""
    deadline = time.monotonic() + 60
    while True:
        found = {path.parent.name for path in server.boxes.glob("*/box.json")}
        if len(found) == number:
            return found
        assert time.monotonic() < deadline, f"{len(found)} boxes, not {number}: {server.tail()}"
        time.sleep(0.02)


def test_a_devbox_takes_a_box_that_waits_and_is_like_any_other(server: Server) -> None:
    ahead = waiting(server, 2)
    with server.api() as api:
        deadline = time.monotonic() + 60
        while "devboxd_warm_boxes 2.0\n" not in api.http.get("/metrics").text:  # whole a moment before it is counted
            assert time.monotonic() < deadline, server.tail()
            time.sleep(0.02)
        first = api.create(
            environment_variables={"WORD": "own"},
            file_mounts={"/tmp/f": "mounted"},
            launch_parameters={"resource_size_request": "X_SMALL", "user_parameters": {"username": "bob", "uid": 1234}},
        )
        assert first in ahead
        seen = api.output(first, "echo $WORD; cat /tmp/f; echo; id -un; hostname; pgrep -c .")
        assert seen.split()[:4] == ["own", "mounted", "bob", "devbox-" + first[4:].lower()]
        (limit,) = (
            path.read_text() for path in server.cgroups(first) if path.name in ("memory.limit_in_bytes", "memory.max")
        )
        assert int(limit) == 1 << 30
        later = [api.create(name=str(number)) for number in range(4)]
        listed = [view["id"] for view in api.boxes()]
        assert listed == [*reversed(later), first], "newest first, however old a box is"
        waiting(server, 7)
        for one in (first, *later):
            api.shutdown(one)


def test_a_server_that_was_killed_leaves_none_that_nobody_wants(server: Server) -> None:
    ahead = waiting(server, 2)
    with server.api() as api:
        mine = api.create()
    assert mine in ahead
    server.kill()
    server.start()
    with server.api() as api:
        assert api.output(mine, "echo lives") == "lives\n"
        kept = waiting(server, 3)
        assert mine in kept
        assert not (ahead - {mine}) & set(os.listdir(server.state / "disks"))
        api.shutdown(mine)
