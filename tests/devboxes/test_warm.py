"""Boxes made ahead: a devbox that takes one is like any other, and nobody else's box is ever lost or left."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from devboxd.config import Settings
from devboxd.devboxes import warm
from devboxd.engine.images import Images
from support.api import Api
from support.disks import upper
from support.engine import Host
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


def counted(server: Server, api: Api, number: int) -> None:
    """Return when so many boxes can be taken: each is whole a moment before that."""
    deadline = time.monotonic() + 60
    while f"devboxd_warm_boxes {number}.0\n" not in api.http.get("/metrics").text:
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.02)


def test_a_devbox_takes_a_box_that_waits_and_is_like_any_other(server: Server) -> None:
    ahead = waiting(server, 2)
    with server.api() as api:
        counted(server, api, 2)
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


def test_the_rehearsal_of_a_command_leaves_nothing(server: Server) -> None:
    ahead = waiting(server, 2)
    with server.api() as api:
        counted(server, api, 2)
        own = {"etc/hostname", "etc/hosts", "etc/resolv.conf"}
        for box in ahead:
            with upper(server.state, box) as folder:
                assert {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} == own
        mine = api.create()
        assert mine in ahead
        told = [line["message"] for line in api.call("GET", f"/v1/devboxes/{mine}/logs")["logs"]]
        assert told == [f"the devbox is {status}" for status in ("provisioning", "initializing", "running")]
        assert api.output(mine, "ps -eo comm=; true").split() == ["init", "bash", "ps"]
        api.shutdown(mine)


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
        deadline = time.monotonic() + 60
        while (ahead - {mine}) & set(os.listdir(server.state / "disks")):
            assert time.monotonic() < deadline, "the disk of one that nobody wants stays"
            time.sleep(0.01)
        api.shutdown(mine)


@pytest.mark.anyio
async def test_none_is_made_while_devboxes_are_created_unless_none_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still, so for ever it is the moment after the last create."""
    image = await Images(Settings()).ensure_default(lambda done, text: None)
    async with Host(image, tmp_path / "state") as host:
        boxes = warm.Warm(host.engine, lambda: image, {"PATH": "/usr/bin:/bin"}, 2)

        async def waiting(number: int) -> None:
            async with asyncio.timeout(60):
                while boxes.ready != number:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)  # nobody is told

        filling = asyncio.create_task(boxes.fill())
        try:
            await waiting(2)
            now = time.monotonic()
            monkeypatch.setattr(warm, "time", SimpleNamespace(monotonic=lambda: now))
            first = boxes.take()
            await asyncio.sleep(0.5)  # a box takes a tenth of that
            assert boxes.ready == 1
            second = boxes.take()
            await waiting(1)
            now += 1
            await waiting(2)
            assert len({first, second, boxes.take(), boxes.take(), None}) == 5
        finally:
            filling.cancel()
            await asyncio.gather(filling, return_exceptions=True)
            await boxes.close()
