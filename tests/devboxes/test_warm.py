"""Boxes made ahead: a devbox that takes one is like any other, and nobody else's box is ever lost or left.

What a size fixes at the start of a box is compared between one that was made ahead and another one, as seen inside.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from devboxd.config import Settings
from devboxd.devboxes import warm
from devboxd.devboxes.views import LaunchParameters, resources
from devboxd.engine.base import Resources
from devboxd.engine.images import Images
from support.api import Api
from support.disks import upper
from support.engine import Host
from support.leftovers import groups
from support.server import Server

pytestmark = pytest.mark.box
_GIB = 1 << 30


@dataclass(frozen=True)
class Size:
    """What a devbox of a size has: cores, GiB of memory and disk, processes of one user."""

    cores: float
    memory: int
    disk: int
    processes: int
    asked: dict[str, Any]


def custom(cores: float, memory: int, disk: int, processes: int) -> Size:
    asked = {"custom_cpu_cores": cores, "custom_gb_memory": memory, "custom_disk_size": disk}
    return Size(cores, memory, disk, processes, {"resource_size_request": "CUSTOM_SIZE", **asked})


def named(name: str, cores: float, memory: int, disk: int, processes: int) -> Size:
    return Size(cores, memory, disk, processes, {"resource_size_request": name})


SIZES = [
    named("X_SMALL", 0.5, 1, 4, 1000),
    named("SMALL", 1, 2, 4, 1000),
    named("MEDIUM", 2, 4, 8, 1000),
    named("LARGE", 2, 8, 16, 2024),
    named("X_LARGE", 4, 16, 16, 4072),
    named("XX_LARGE", 8, 32, 16, 8168),
    custom(1, 4, 10, 1000),
    custom(2, 16, 64, 4072),
]
INSIDE = """
df --block-size=1 --output=target,size,itotal / /dev/shm /run/devboxd /dev
cat /proc/self/limits
echo processors $(nproc) $(getconf _NPROCESSORS_ONLN)
"""
"""Shows all that is fixed when a box starts."""
LIMITS = ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.max", "pids.max")


@pytest.fixture(scope="module")
def one_ahead() -> Iterator[Server]:
    server = Server(warm_boxes="1")
    try:
        yield server.start()
    finally:
        server.stop()


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


def inside(server: Server, api: Api, box: str) -> dict[str, list[str]]:
    """What a size fixes at the start, and the limits of the cgroups, by name."""
    lines = [line.split() for line in api.output(box, INSIDE).splitlines()]
    found = {" ".join(words[:2] if words[0] == "Max" else words[:1]): words for words in lines}
    return found | {path.name: path.read_text().split() for path in server.cgroups(box) if path.name in LIMITS}


def check(size: Size, found: dict[str, list[str]]) -> None:
    """Compare what was seen with the table of sizes."""
    assert size.disk * _GIB <= int(found["/"][1]) <= size.disk * _GIB * 1.05
    assert int(found["/dev/shm"][1]) == size.memory * _GIB // 2
    assert found["Max processes"][2:4] == [str(size.processes)] * 2
    processors = min(os.cpu_count() or 1, math.ceil(size.cores))
    assert found["processors"][1:] == [str(processors)] * 2
    memory = found.get("memory.limit_in_bytes") or found["memory.max"]
    quota = found.get("cpu.cfs_quota_us") or found["cpu.max"]
    assert (int(memory[0]), int(quota[0])) == (size.memory * _GIB, size.cores * 100_000)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "-".join(str(value) for value in size.asked.values()))
def test_a_box_made_ahead_has_the_size_that_was_asked(one_ahead: Server, size: Size) -> None:
    seen: dict[bool, dict[str, list[str]]] = {}
    with one_ahead.api() as api:
        deadline = time.monotonic() + 120
        while len(seen) < 2:
            assert time.monotonic() < deadline, f"made ahead or not: only {seen.keys()}"
            if False in seen:
                counted(one_ahead, api, 1)
            before = {path.name for path in one_ahead.boxes.iterdir()}
            box = api.create(launch_parameters=size.asked)
            if (ahead := box in before) not in seen:
                seen[ahead] = inside(one_ahead, api, box)
                api.call("POST", f"/v1/devboxes/{box}/suspend")
                api.wait_box(box, "suspended")
                api.call("POST", f"/v1/devboxes/{box}/resume")
                api.wait_box(box, "running")
                assert inside(one_ahead, api, box) == seen[ahead]
            api.shutdown(box)
    assert seen[True] == seen[False]
    check(size, seen[True])


def test_a_devbox_takes_a_box_that_waits_and_is_like_any_other(server: Server) -> None:
    ahead = waiting(server, 2)
    with server.api() as api:
        counted(server, api, 2)
        first = api.create(
            environment_variables={"WORD": "own"},
            file_mounts={"/tmp/f": "mounted"},
            launch_parameters={"user_parameters": {"username": "bob", "uid": 1234}},
        )
        assert first in ahead
        seen = api.output(first, "echo $WORD; cat /tmp/f; echo; id -un; hostname; pgrep -c .")
        assert seen.split()[:4] == ["own", "mounted", "bob", "devbox-" + first[4:].lower()]
        (limit,) = (
            path.read_text() for path in server.cgroups(first) if path.name in ("memory.limit_in_bytes", "memory.max")
        )
        assert int(limit) == 2 << 30
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


SMALL, LARGE, XX_LARGE = (
    resources(LaunchParameters(resource_size_request=name)) for name in ("SMALL", "LARGE", "XX_LARGE")
)


@pytest.mark.parametrize(
    ("asked", "number", "wanted"),
    [
        ([SMALL], 2, [SMALL, SMALL]),
        ([SMALL], 0, []),
        ([SMALL, LARGE], 2, [LARGE, SMALL]),
        ([SMALL, LARGE], 1, [LARGE]),
        ([SMALL, LARGE, LARGE], 2, [LARGE, LARGE]),
        ([SMALL, *[LARGE] * 3, *[SMALL] * 12], 2, [SMALL, SMALL]),
        ([SMALL, *[LARGE] * 3, *[SMALL] * 12], 5, [SMALL, SMALL, SMALL, SMALL, LARGE]),
        ([LARGE, SMALL, XX_LARGE], 2, [XX_LARGE, SMALL]),
    ],
)
def test_boxes_wait_in_the_sizes_asked_for_lately(asked: list[Resources], number: int, wanted: list[Resources]) -> None:
    assert warm.sizes(asked, number) == wanted


@pytest.mark.anyio
async def test_no_box_of_another_size_is_taken_and_the_number_stays(tmp_path: Path) -> None:
    image = await Images(Settings()).ensure_default(lambda done, text: None)
    async with Host(image, tmp_path / "state") as host:
        boxes = warm.Warm(host.engine, lambda: image, {"PATH": "/usr/bin:/bin"}, 2)
        filling = asyncio.create_task(boxes.fill())

        async def taken(size: Resources, others: set[str]) -> str:
            async with asyncio.timeout(60):
                while (box := boxes.take(size)) is None:
                    await asyncio.sleep(4 * warm._REST_S)  # no event tells it; each question counts as a create
                    waiting = (await host.engine.boxes()).keys() - others
                    assert len(waiting) <= 2, "one is ended before another is made"
            return box

        try:
            small = await taken(SMALL, set())
            assert boxes.take(LARGE) is None
            box = await taken(LARGE, {small})
            files = [path for path in groups(f"*/boxes/{box}/*") if path.name in LIMITS]
            assert str(LARGE.memory_bytes) in {path.read_text().strip() for path in files}
        finally:
            filling.cancel()
            await asyncio.gather(filling, return_exceptions=True)
            await boxes.close()


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
            first = boxes.take(SMALL)
            await asyncio.sleep(0.5)  # a box takes a tenth of that
            assert boxes.ready == 1
            second = boxes.take(SMALL)
            await waiting(1)
            now += 1
            await waiting(2)
            assert len({first, second, boxes.take(SMALL), boxes.take(SMALL), None}) == 5
        finally:
            filling.cancel()
            await asyncio.gather(filling, return_exceptions=True)
            await boxes.close()
