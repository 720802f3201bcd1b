"""The size of a devbox bounds its disk, and a full one troubles nobody else."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box
SMALLEST = {
    "resource_size_request": "CUSTOM_SIZE",
    "custom_cpu_cores": 0.5,
    "custom_gb_memory": 1,
    "custom_disk_size": 2,
}
FILL = "fallocate -l 1900M /tmp/large; dd if=/dev/zero of=/tmp/more bs=1M count=400 2>&1; sync"


def test_a_full_disk_ends_writing_and_nothing_else(api: Api, server: Server) -> None:
    if not (server.state / "pool.btrfs").exists():
        pytest.skip("this machine has no btrfs, and plain folders have no limit")
    box, neighbour = api.create(launch_parameters=SMALLEST), api.create()
    api.write(box, "/tmp/before", "kept")
    assert 2040 << 20 < _left(api, box) <= 2 << 30
    assert "No space left" in api.run(box, FILL, seconds=120)["stdout"]
    assert api.output(box, "echo runs; cat /tmp/before") == "runs\nkept"
    assert api.read(box, "/tmp/before") == "kept"
    assert _left(api, box) < 1 << 20
    assert api.output(neighbour, "head -c 1000000 /dev/zero >/tmp/f && stat -c %s /tmp/f") == "1000000\n"
    assert api.call("GET", f"/v1/devboxes/{box}/usage")["live"]["disk_bytes"] > 1900 << 20
    _says(api, box, "the disk is full")
    api.call("POST", f"/v1/devboxes/{box}/suspend")
    api.wait_box(box, "suspended")
    api.call("POST", f"/v1/devboxes/{box}/resume")
    api.wait_box(box, "running")
    snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")
    assert snapshot["size_bytes"] > 1 << 30
    fork = api.create(launch_parameters=SMALLEST, snapshot_id=snapshot["id"])
    assert "No space left" in api.run(fork, "head -c 200M /dev/zero >/tmp/third; sync")["stderr"]
    assert api.output(fork, "rm /tmp/large && echo again >/tmp/after && cat /tmp/after") == "again\n"
    api.shutdown(fork)
    assert not _said(api, box, "the disk has room again"), "it had none when it slept either"
    assert api.output(box, "rm /tmp/large /tmp/more && echo again >/tmp/after && cat /tmp/after") == "again\n"
    _says(api, box, "the disk has room again")
    api.call("POST", f"/v1/devboxes/disk_snapshots/{snapshot['id']}/delete")
    for one in (box, neighbour):
        api.shutdown(one)


def test_no_devbox_is_smaller_than_its_snapshot(api: Api, server: Server) -> None:
    if not (server.state / "pool.btrfs").exists():
        pytest.skip("this machine has no btrfs, and plain folders have no limit")
    box = api.create()
    api.run(box, "fallocate -l 2200M /tmp/large; sync")
    snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
    body = {"launch_parameters": SMALLEST, "snapshot_id": snapshot}
    text = api.refused("POST", "/v1/devboxes", 400, body)
    assert re.search(r"it holds 2\d\d\d MiB, and the disk of the devbox would have 2048 MiB", text), text
    body["launch_parameters"] = {**SMALLEST, "custom_disk_size": 4}
    assert api.output(api.create(**body), "stat -c %s /tmp/large; echo x >/tmp/x; cat /tmp/x").endswith("\nx\n")


def test_a_launch_command_that_fills_the_disk_says_so(api: Api, server: Server) -> None:
    if not (server.state / "pool.btrfs").exists():
        pytest.skip("this machine has no btrfs, and plain folders have no limit")
    launch = {**SMALLEST, "launch_commands": ["head -c 3G /dev/zero >/tmp/large"]}
    view = api.wait_box(api.call("POST", "/v1/devboxes", {"launch_parameters": launch})["id"], "failure")
    assert view["failure_reason"] == "out_of_disk"
    assert "launch command 1 of 1" in view["state_transitions"][-1]["failure_reason"]


def _left(api: Api, box: str) -> int:
    """What a program in the devbox finds that it can write."""
    return int(api.output(box, "df --output=avail -B1 /tmp | tail -n 1"))


def _says(api: Api, box: str, words: str) -> None:
    """Wait until the log of the devbox has these words; disks are counted a little late."""
    deadline = time.monotonic() + 60
    while not _said(api, box, words):
        assert time.monotonic() < deadline, f"the log never says that {words}"
        time.sleep(0.1)


def _said(api: Api, box: str, words: str) -> bool:
    return any(words in str(line["message"]) for line in api.call("GET", f"/v1/devboxes/{box}/logs")["logs"])


@pytest.fixture
def paced() -> Iterator[Server]:
    server = Server(disk_bytes_per_second=str(8 << 20))
    try:
        yield server.start()
    finally:
        server.stop()


def test_no_box_is_faster_with_its_disk_than_the_setting_says(paced: Server) -> None:
    with paced.api() as api:
        box = api.create()
        for way in ("if=/dev/zero of=/tmp/much conv=fsync", "if=/tmp/much of=/dev/null iflag=direct"):
            begun = time.monotonic()
            api.output(box, f"dd {way} bs=1M count=24 2>/dev/null")
            assert time.monotonic() - begun > 2.0, "24 MiB, 8 a second"
        api.shutdown(box)
