"""Where disks are plain folders a snapshot is copied file by file: whatever happens meanwhile, none is torn or lost.

The copies of these tests begin for real, and go on when the test lets them.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.api import Api
from support.server import Server
from support.until import until

pytestmark = pytest.mark.box
_PATIENCE_S = 60.0
_CP = """#!/bin/sh
touch "{place}/begun.$$"
until rm "{place}/go" 2>/dev/null || test -e "{place}/open"; do sleep 0.01; done
exec {cp} "$@"
"""


class Gate:
    """Copies stop at it, each until one is let through, or all are."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._begun: set[Path] = set()

    def next(self) -> int:
        """The process of the next copy, once that has begun."""
        found = until(lambda: set(self.place.glob("begun.*")) - self._begun)
        self._begun |= found
        (path,) = found
        return int(path.suffix[1:])

    @property
    def begun(self) -> int:
        """How many copies have begun so far."""
        return len(list(self.place.glob("begun.*")))

    def let_one(self) -> None:
        (self.place / "go").touch()

    def open(self) -> None:
        (self.place / "open").touch()


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gate:
    place, programs = tmp_path / "gate", tmp_path / "programs"
    place.mkdir()
    programs.mkdir()
    (programs / "cp").write_text(_CP.format(place=place, cp=shutil.which("cp")))
    (programs / "cp").chmod(0o755)
    path = subprocess.run(["sh", "-c", "echo $PATH"], capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.setenv("PATH", f"{programs}:{path}")
    return Gate(place)


@pytest.fixture
def plain(gate: Gate) -> Iterator[Server]:
    """A server whose pool is a folder; one that holds a disk already stays so."""
    server = Server()
    (server.state / "disks" / "kept").mkdir(parents=True)
    try:
        yield server.start()
    finally:
        gate.open()
        server.stop()


def take(api: Api, box: str) -> str:
    """The id of a snapshot that is being taken."""
    return str(api.call("POST", f"/v1/devboxes/{box}/snapshot_disk_async", {})["id"])


def status(api: Api, snapshot: str) -> Any:
    return api.call("GET", f"/v1/devboxes/disk_snapshots/{snapshot}/status")


def settled(api: Api, snapshot: str) -> Any:
    return until(lambda: (view := status(api, snapshot))["status"] != "in_progress" and view)


def stands_still(server: Server, box: str) -> bool:
    """Whether the kernel lets no process of the box run."""
    texts = [path.read_text() for path in server.cgroups(box) if path.name in ("freezer.state", "cgroup.events")]
    assert texts
    return any("FROZEN" in text or "frozen 1" in text for text in texts)


def test_a_kill_in_the_midst_of_a_copy_leaves_nobody_standing_still(plain: Server, gate: Gate) -> None:
    with plain.api() as api:
        box = api.create()
        api.run(box, "echo kept >/tmp/t")
        snapshot = take(api, box)
        copying = gate.next()
        assert stands_still(plain, box)
        plain.kill()
        until(lambda: not Path(f"/proc/{copying}").exists())
        gate.open()
        plain.start()
        assert api.output(box, "cat /tmp/t") == "kept\n"
        view = status(api, snapshot)
        assert (view["status"], "the server ended while it was taken" in view["error_message"]) == ("error", True)
        assert not list((plain.state / "disks").glob(".new-*"))
        api.shutdown(box)


def test_each_of_two_at_once_is_of_one_instant(plain: Server, gate: Gate) -> None:
    with plain.api() as api:
        box = api.create()
        api.start(box, "n=0; while echo $n >/tmp/one; echo $n >/tmp/two; do n=$((n + 1)); done")
        api.output(box, "until [ -e /tmp/two ]; do sleep 0.01; done")
        snapshots = []
        for _ in range(2):
            snapshots.append(take(api, box))
        for snapshot in snapshots:
            gate.next()
            assert stands_still(plain, box)
            gate.let_one()
            assert settled(api, snapshot)["status"] == "complete"
        until(lambda: not stands_still(plain, box))
        for snapshot in snapshots:
            upper = plain.state / "disks" / snapshot / "upper/tmp"
            one, two = (int((upper / name).read_text() or -1) for name in ("one", "two"))
            assert -1 in (one, two) or one - two in (0, 1)
        api.shutdown(box)


def test_a_suspend_waits_and_its_hooks_run_after(plain: Server, gate: Gate) -> None:
    hooks = {"suspend_commands": ["touch /tmp/hooked"]}
    with plain.api() as api:
        box = api.create(launch_parameters={"lifecycle": {"lifecycle_hooks": hooks}})
        snapshot = take(api, box)
        gate.next()
        assert api.call("POST", f"/v1/devboxes/{box}/suspend")["status"] == "suspending"
        assert "suspended" in api.refused("POST", f"/v1/devboxes/{box}/snapshot_disk_async", 400, {})
        gate.let_one()
        api.wait_box(box, "suspended")
        assert status(api, snapshot)["status"] == "complete"
        disks = plain.state / "disks"
        assert not (disks / snapshot / "upper/tmp/hooked").exists()
        assert (disks / box / "upper/tmp/hooked").exists()
        api.shutdown(box)


def test_a_shutdown_by_force_loses_no_snapshot(plain: Server, gate: Gate) -> None:
    with plain.api() as api:
        box = api.create()
        api.run(box, "echo kept >/tmp/t; head -c 5M /dev/urandom >/tmp/five")
        snapshot = take(api, box)
        gate.next()
        assert "force=true" in api.refused("POST", f"/v1/devboxes/{box}/shutdown", 409)
        assert api.call("POST", f"/v1/devboxes/{box}/shutdown", params={"force": "true"})["status"] == "shutdown"
        gate.open()
        view = settled(api, snapshot)
        assert view["status"] == "complete"
        assert 5 << 20 <= view["snapshot"]["size_bytes"] < 6 << 20
        fork = api.create(snapshot_id=snapshot)
        assert api.output(fork, "cat /tmp/t") == "kept\n"
        api.shutdown(fork)
        until(lambda: not (plain.state / "disks" / box).exists())


def test_copies_hold_nobody_up(plain: Server, gate: Gate) -> None:
    """Neither other work nor the end of the server; and who gives up waiting for one leaves nothing."""
    with plain.api() as api:
        source, *others = (api.create() for _ in range(4))
        snapshot = take(api, source)
        gate.next()
        gate.let_one()
        assert settled(api, snapshot)["status"] == "complete"
        forks = [api.call("POST", "/v1/devboxes", {"snapshot_id": snapshot})["id"] for _ in range(8)]
        until(lambda: gate.begun == 3)
        for box in others:
            take(api, box)
        until(lambda: gate.begun == 4)
        api.write(source, "/tmp/written", "meanwhile")
        assert api.output(source, "cat /tmp/written") == "meanwhile"
        api.shutdown(forks[0])
        until(lambda: not (plain.state / "disks" / f".new-{forks[0]}").exists())
        assert plain.terminate() < 5
        gate.open()
        plain.start()
        for fork in forks[1:]:
            api.wait_box(fork, "running")
        for box in (source, *others, *forks[1:]):
            api.shutdown(box)
