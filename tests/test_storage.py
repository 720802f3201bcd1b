"""`devboxd storage`, beside a running server and without one."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from support.api import Api
from support.server import PROGRAM, Server

pytestmark = pytest.mark.box
GIB = 1 << 30


def storage(state: Path, *words: str, code: int = 0) -> str:
    """Run the command; what it said, on standard error if it was refused."""
    command = [PROGRAM, "storage", *words, "--state", state]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    return done.stderr if code == 2 else done.stdout


def status(state: Path) -> Any:
    return json.loads(storage(state, "status", "--json"))


def test_it_is_seen_grown_and_checked_while_a_server_runs_and_while_none_does(own_server: Server) -> None:
    state = own_server.state
    found = status(state)
    assert found["kind"] == "file", "tests of the pool need a state folder on a file system that is not btrfs"
    with own_server.api() as api:
        box = api.create()
        snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk", {})["id"]
        found = status(state)
        assert (found["devboxes"], found["warm_boxes"], found["snapshots"], found["shown"]) == (1, 0, 1, True)
        assert found["allocated"] == found["size"] <= found["may_grow_to"]
        assert found["size"] + found["may_still_grow_by"] <= found["may_grow_to"] + GIB // 64
        assert 0 < found["used"] < found["size"]
        more = found["size"] // GIB + 1
        storage(state, "grow", f"{more}G")
        assert status(state)["size"] == more * GIB
        assert int(api.output(box, "df --output=size -B1 / | tail -n 1")) <= more * GIB
        assert storage(state, "check") != ""
    own_server.terminate()
    assert "boxes use it" in storage(state, "check", code=2)
    storage(state, "grow", f"{more + 1}GiB")
    own_server.start()
    assert status(state)["size"] == (more + 1) * GIB
    with own_server.api() as api:
        api.shutdown(box)
        _gone(own_server, box)
        own_server.terminate()
        stopped = status(state)
        assert (stopped["shown"], stopped["free"], stopped["devboxes"]) == (False, None, None)
        storage(state, "check")
        own_server.start()
        assert api.output(api.create(snapshot_id=snapshot), "echo whole") == "whole\n"


def test_its_counts_agree_with_the_list_of_boxes(tmp_path: Path) -> None:
    server = Server(warm_boxes="2")
    try:
        with server.start().api() as api:
            api.create()
            asleep = api.create()
            api.call("POST", f"/v1/devboxes/{asleep}/suspend")
            api.wait_box(asleep, "suspended")
            deadline = time.monotonic() + 60
            while (found := status(server.state))["warm_boxes"] != 2:
                assert time.monotonic() < deadline, found
                time.sleep(0.1)
            assert found["devboxes"] == len(api.boxes()) == 2
    finally:
        server.stop()


def _gone(server: Server, box: str) -> None:
    with server.api() as api:
        api.wait_box(box, "shutdown")
    while (server.boxes / box).exists() or (server.state / "disks" / box).exists():
        time.sleep(0.05)


def test_damage_is_told(own_server: Server) -> None:
    own_server.terminate()
    with (own_server.state / "pool.btrfs").open("r+b") as file:
        file.seek(65536 + 64)
        file.write(b"nonsense")
    storage(own_server.state, "check", code=1)
    with (own_server.state / "pool.btrfs").open("r+b") as file:
        file.seek(65536 + 64)
        file.write(b"_BHRfS_M")
    own_server.start()


@pytest.mark.parametrize(("size", "words"), [("1G", "has"), ("900000T", "has room for"), ("12", "such as 64G")])
def test_a_size_that_cannot_be_is_refused(server: Server, api: Api, size: str, words: str) -> None:
    before = status(server.state)["size"]
    said = storage(server.state, "grow", size, code=2)
    assert said.startswith("cannot ")
    assert words in said
    assert status(server.state)["size"] == before


def test_where_no_server_has_run_there_is_nothing_to_see(tmp_path: Path) -> None:
    for words in (("status",), ("grow", "64G"), ("check",)):
        assert "no server has run" in storage(tmp_path, *words, code=2)
