"""Blocks that a disk shares with a snapshot: writing over them takes room a second time, and that room is there."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.api import Api
from support.disk import small_disk
from support.server import Server

pytestmark = pytest.mark.box

MIB = 1 << 20
HELD = 500
MAKE = f"head -c {HELD}M /dev/zero | tr '\\0' a >held && sync -f ."
WRITE_OVER = f"head -c {HELD}M /dev/zero | tr '\\0' b | dd of=held bs=1M conv=notrunc,fsync iflag=fullblock status=none"
HOLDS = "tr -d {} <held | wc -c; stat -c %s held"
FLOOD = "cat /dev/zero >more; sync -f . && echo synced"
SIZE = {
    "resource_size_request": "CUSTOM_SIZE",
    "custom_cpu_cores": 1,
    "custom_gb_memory": 2,
    "custom_disk_size": 4,
}


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on a disk of 3 GiB, of which all is the pool's."""
    with small_disk(3072) as disk:
        server = Server()
        server.state = disk.folder / "state"
        try:
            yield server.start()
        finally:
            server.stop()


def _flood(api: Api, box: str) -> None:
    """Fill the pool, as far as boxes may."""
    said = api.run(box, FLOOD, 120)
    assert "No space left" in said["stderr"], said
    assert said["stdout"] == "synced\n", said


def _once_there_is_room(api: Api, path: str, body: Any = None) -> Any:
    """The answer, when it is no 503 any more: the kernel gives back later what is gone."""
    deadline = time.monotonic() + 60
    while (answer := api.http.post(path, json=body)).status_code == 503:
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.1)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _held(api: Api, box: str, letter: str) -> None:
    assert api.output(box, HOLDS.format(letter)) == f"0\n{HELD * MIB}\n"


@pytest.mark.parametrize("alone", [False, True], ids=["beside a server", "without one"])
def test_all_that_is_shared_can_be_written_over_in_a_full_pool(server: Server, alone: bool) -> None:
    """The other one meets ENOSPC; whoever holds what a snapshot holds too meets nothing."""
    with server.api() as api:
        box, other = api.create(launch_parameters=SIZE), api.create(launch_parameters=SIZE)
        api.output(box, MAKE)
        snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
        _flood(api, other)
        if alone:
            waits = f"until [ -e /dev/shm/go ]; do sleep 0.02; done; {WRITE_OVER} && touch /dev/shm/done"
            execution = api.start(box, waits)
            server.kill()
            inside = ("nsenter", f"--target={server.agent(box)}", "--user", "--mount", "--setuid=0", "--setgid=0")
            subprocess.run([*inside, "touch", "/dev/shm/go"], check=True)
            deadline = time.monotonic() + 120
            while not Path("/proc", str(server.agent(box)), "root/dev/shm/done").exists():
                assert time.monotonic() < deadline, "the box is still writing"
                time.sleep(0.02)
            server.start()
            said = api.wait(box, execution, 120)
        else:
            said = api.run(box, WRITE_OVER, 120)
        assert (said["exit_status"], said["stderr"]) == (0, ""), said
        api.call("POST", f"/v1/devboxes/{box}/suspend")
        api.wait_box(box, "suspended")
        api.shutdown(other)
        _once_there_is_room(api, f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "running")
        _held(api, box, "b")
        begun = _once_there_is_room(api, "/v1/devboxes", {"snapshot_id": snapshot, "launch_parameters": SIZE})
        api.wait_box(begun["id"], "running")
        _held(api, begun["id"], "a")


def test_what_would_share_more_than_there_is_room_for_is_refused(server: Server) -> None:
    """A snapshot, a devbox from one, and a resume; nothing happens to those that there are."""
    with server.api() as api:
        box, other = api.create(launch_parameters=SIZE), api.create(launch_parameters=SIZE)
        api.output(box, MAKE)
        snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
        api.call("POST", f"/v1/devboxes/{box}/suspend")
        api.wait_box(box, "suspended")
        api.output(other, MAKE)
        _flood(api, other)
        for path, body in {
            f"/v1/devboxes/{other}/snapshot_disk": None,
            "/v1/devboxes": {"snapshot_id": snapshot},
            f"/v1/devboxes/{box}/resume": None,
        }.items():
            said = api.refused("POST", path, 503, body)
            assert "full" in said or "room" in said, said
        assert api.output(other, "rm more && echo room >file && sync -f . && cat file") == "room\n"
        _held(api, other, "a")
        _once_there_is_room(api, f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "running")
        assert api.run(box, WRITE_OVER, 120)["exit_status"] == 0
        _held(api, box, "b")
