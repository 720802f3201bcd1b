"""`devboxd backup` of a server that runs, and servers that are restored from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.api import Api
from support.disk import small_disk
from support.server import PROGRAM, Server

pytestmark = pytest.mark.box


def devboxd(server: Server, *words: str | Path, code: int = 0) -> str:
    """Run the command with the server's settings; what it said to people. What is refused shows no bar before."""
    done = subprocess.run(
        [PROGRAM, *words], capture_output=True, text=True, env=server.environment(), timeout=300, check=False
    )
    assert done.returncode == code, done
    assert code != 2 or done.stderr.strip().startswith("cannot "), done
    return done.stderr


@pytest.fixture
def place(own_server: Server) -> Path:
    """For backups: beside the state folder, on the same real disk."""
    return own_server.folder / "backup"


@pytest.fixture
def restored(own_server: Server) -> Iterator[Server]:
    """A second server, which has not run yet, with the keys of the first."""
    server = Server()
    server.key = own_server.key
    try:
        yield server
    finally:
        server.stop()


def _write(api: Api, box: str, text: str) -> None:
    """Files of all kinds that a disk can hold."""
    api.output(
        box,
        f"echo {text} >kept && ln -s kept link && ln kept hard && sudo chown 65534:4 kept && mkfifo -m 600 pipe && "
        "truncate -s 1G holes && echo end >>holes && sudo rm /etc/motd && mkdir $'a b\\n\\\\c'",
    )


def test_a_server_comes_back_with_all_that_it_kept(own_server: Server, place: Path, restored: Server) -> None:
    """What ran sleeps, what slept sleeps on, and every byte that was confirmed is there."""
    with own_server.api() as api:
        running, asleep, over = api.create(name="runs"), api.create(name="sleeps"), api.create(name="ended")
        done = api.run(running, "seq 20000; exit 3")["execution_id"]
        writing = api.start(running, "n=0; while echo $n >>lines; do n=$((n+1)); done")
        for box, text in ((running, "one"), (asleep, "two"), (over, "three")):
            _write(api, box, text)
        snapshot = api.call("POST", f"/v1/devboxes/{over}/snapshot_disk", {"name": "kept"})["id"]
        digest = api.call("POST", f"/v1/devboxes/disk_snapshots/{snapshot}/verify")["manifest_digest"]
        gone = api.call("POST", f"/v1/devboxes/{over}/snapshot_disk")["id"]
        api.call("POST", f"/v1/devboxes/disk_snapshots/{gone}/delete")
        api.shutdown(over)
        api.call("POST", f"/v1/devboxes/{asleep}/suspend")
        api.wait_box(asleep, "suspended")
        devboxd(own_server, "backup", place, "--state", own_server.state)
        later = api.create(name="later")
    assert not list((own_server.state / "disks").glob(".still-*"))
    assert oct(place.stat().st_mode)[-2:] == "00"

    devboxd(restored, "restore", place, "--state", restored.state)
    restored.start()
    with restored.api() as api:
        assert api.refused("GET", f"/v1/devboxes/{later}", 404)
        assert api.box(over)["status"] == "shutdown"
        view = api.wait_box(running, "suspended")
        assert "it was restored from a backup; its processes" in view["state_transitions"][-1]["failure_reason"]
        assert api.wait(running, done)["exit_status"] == 3
        assert api.streamed(running, done) == "".join(f"{n}\n" for n in range(1, 20001))
        assert api.wait(running, writing)["exit_status"] == 137
        verified = api.call("POST", f"/v1/devboxes/disk_snapshots/{snapshot}/verify")
        assert verified["manifest_digest"] == digest
        boxes = {api.create(snapshot_id=snapshot): "three", running: "one", asleep: "two"}
        for box, text in boxes.items():
            if api.box(box)["status"] == "suspended":
                api.call("POST", f"/v1/devboxes/{box}/resume")
                api.wait_box(box, "running")
            found = api.output(
                box, "cat link; stat -c '%u:%g %h' hard; stat -c '%F %a' pipe; ls -Qd a*; stat -c %s holes"
            )
            assert found == text + '\n65534:4 2\nfifo 600\n"a b\\n\\\\c"\n1073741828\n'
            assert (
                api.output(box, "test ! -e /etc/motd && test $(stat -c %b holes) -lt 1000 && echo sparse") == "sparse\n"
            )
            own = "grep -c \"^$(hostname -I | cut -d' ' -f1)[[:space:]]$(hostname)$\" /etc/hosts"
            assert api.output(box, own) == "1\n", "on another machine it has another address"
        lines = api.output(running, "seq 0 $(($(wc -l <lines) - 1)) | cmp - lines && echo whole")
        assert lines == "whole\n"


def test_without_a_server_the_same_is_kept(own_server: Server, place: Path, restored: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        api.write(box, "/home/user/kept", "bytes")
        own_server.terminate()
        devboxd(own_server, "backup", place, "--state", own_server.state)
        own_server.start()
        assert api.read(box, "/home/user/kept") == "bytes"
    shutil.rmtree(place / "images")
    listed = json.loads((place / "backup.json").read_text())
    listed["archives"] = [one for one in listed["archives"] if not one["path"].startswith("images")]
    (place / "backup.json").write_text(json.dumps(listed))
    devboxd(restored, "restore", place, "--state", restored.state)
    restored.start()
    with restored.api() as api:
        api.call("POST", f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "running")
        assert api.read(box, "/home/user/kept") == "bytes"


def test_archives_that_are_damaged_cost_only_what_they_held(own_server: Server, place: Path, restored: Server) -> None:
    with own_server.api() as api:
        box, other, asleep = api.create(), api.create(), api.create()
        api.call("POST", f"/v1/devboxes/{asleep}/suspend")
        api.wait_box(asleep, "suspended")
        first, second = (api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"] for _ in range(2))
        devboxd(own_server, "backup", place, "--state", own_server.state)
    for name in (f"snapshots/{first}.tar", f"disks/{other}.tar", f"disks/{asleep}.tar"):
        with (place / name).open("r+b") as file:
            file.seek(1000)
            file.write(b"other bytes")
    said = devboxd(restored, "restore", place, "--state", restored.state, code=1)
    assert all(f"not restored: {name}: " in said for name in (first, other, asleep))
    restored.start()
    with restored.api() as api:
        assert "was not restored" in api.call("GET", f"/v1/devboxes/disk_snapshots/{first}/status")["error_message"]
        assert api.output(api.create(snapshot_id=second), "echo whole") == "whole\n"
        view = api.wait_box(other, "failure")
        assert view["state_transitions"][-1]["failure_reason"].startswith("it was restored from a backup, and")
        view = api.wait_box(asleep, "failure")
        assert view["state_transitions"][-1]["failure_reason"] == "it was restored from a backup, without its disk"
        assert api.wait_box(box, "suspended")


def test_a_restore_that_is_cut_is_taken_by_no_server_and_begins_again(
    own_server: Server, place: Path, restored: Server
) -> None:
    with own_server.api() as api:
        box = api.create()
        devboxd(own_server, "backup", place, "--state", own_server.state)
    disk = place / "disks" / f"{box}.tar"
    disk.rename(place / "whole")
    os.mkfifo(disk)
    command = [PROGRAM, "restore", place, "--state", restored.state]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as cut, disk.open("wb"):  # opened when it is read
        cut.kill()
    (place / "whole").rename(disk)
    assert "a restore into it was cut" in devboxd(restored, "serve", "--state", restored.state, code=2)
    devboxd(restored, "restore", place, "--state", restored.state)
    restored.start()
    with restored.api() as api:
        assert api.wait_box(box, "suspended")


def test_a_cut_restore_onto_btrfs_begins_again(own_server: Server, place: Path, restored: Server) -> None:
    """What lies there cannot just be emptied."""
    with own_server.api() as api:
        box = api.create()
        api.write(box, "/home/user/kept", "bytes")
        snapshots = [api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"] for _ in range(2)]
        devboxd(own_server, "backup", place, "--state", own_server.state)
    *_, last = json.loads((place / "backup.json").read_text())["archives"]
    archive = place / last["path"]
    archive.rename(place / "whole")
    os.mkfifo(archive)
    with small_disk(1024, ("mkfs.btrfs", "-q")) as disk:
        restored.state = disk.folder / "state"
        command = [PROGRAM, "restore", place, "--state", restored.state]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as cut, archive.open("wb"):  # opened when it is read
            cut.kill()
        assert any((restored.state / "disks").glob("snp_*"))
        archive.unlink()
        (place / "whole").rename(archive)
        devboxd(restored, "restore", place, "--state", restored.state)
        restored.start()
        with restored.api() as api:
            fork = api.create(snapshot_id=snapshots[0])
            assert api.read(fork, "/home/user/kept") == "bytes"
        restored.stop()


def test_what_opens_other_things_is_kept_apart(own_server: Server, place: Path, restored: Server) -> None:
    apart = own_server.folder / "apart"
    (own_server.state / "first-key").write_text("ak_planted\n")
    devboxd(own_server, "backup", place, "--secrets", apart, "--state", own_server.state)
    found = subprocess.run(["grep", "-rl", "ak_planted", place], capture_output=True, text=True, check=False)
    assert (found.stdout, found.returncode) == ("", 1)
    assert [path.name for path in apart.iterdir()] == ["first-key"]
    assert oct((apart / "first-key").stat().st_mode)[-3:] == "600"
    devboxd(restored, "restore", place, "--secrets", apart, "--state", restored.state)
    assert (restored.state / "first-key").read_text() == "ak_planted\n"
    restored.start()


def test_what_cannot_be_is_refused_and_changes_nothing(own_server: Server, place: Path, tmp_path: Path) -> None:
    state = own_server.state
    tmp_path.joinpath("file").touch()
    assert "is not empty" in devboxd(own_server, "backup", tmp_path, "--state", state, code=2)
    assert "into itself" in devboxd(own_server, "backup", state / "journals" / "b", "--state", state, code=2)
    assert "no such folder" in devboxd(own_server, "backup", place, "--state", place / "none", code=2)
    assert "is no backup" in devboxd(own_server, "restore", tmp_path, "--state", place, code=2)
    assert "no server has run with it" in devboxd(own_server, "backup", place, "--state", tmp_path, code=2)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert not place.exists()
    devboxd(own_server, "backup", place, "--state", state)
    assert "is not empty" in devboxd(own_server, "restore", place, "--state", state, code=2)
    listed = (place / "backup.json").read_text()
    (place / "backup.json").write_text(listed.replace('"format": 1', '"format": 2'))
    assert "newer" in devboxd(own_server, "restore", place, "--state", tmp_path / "new", code=2)
    (place / "backup.json").write_text(listed)
    (place / "devboxd.db").unlink()
    assert "has no devboxd.db" in devboxd(own_server, "restore", place, "--state", tmp_path / "new", code=2)
    assert not (tmp_path / "new").exists()
    assert not (place / "devboxd.db").exists()
    with own_server.api() as api:
        assert api.output(api.create(), "echo runs") == "runs\n"


def test_in_plain_folders_what_runs_is_left_out_and_named(place: Path, restored: Server) -> None:
    """They lie there where an earlier disk does."""
    server = Server()
    try:
        (server.state / "disks" / "earlier").mkdir(parents=True)
        with server.start().api() as api:
            runs, sleeps = api.create(), api.create()
            api.write(sleeps, "/home/user/kept", "bytes")
            snapshot = api.call("POST", f"/v1/devboxes/{sleeps}/snapshot_disk")["id"]
            api.call("POST", f"/v1/devboxes/{sleeps}/suspend")
            api.wait_box(sleeps, "suspended")
            said = devboxd(server, "backup", place, "--state", server.state, code=1)
            assert f"left out: {runs}: it runs" in said
            assert said.count("left out") == 1
        said = devboxd(restored, "restore", place, "--state", restored.state, code=1)
        assert f"not restored: {runs}: it runs" in said
        restored.key = server.key
        restored.start()
        with restored.api() as api:
            assert api.wait_box(runs, "failure")
            api.call("POST", f"/v1/devboxes/{sleeps}/resume")
            api.wait_box(sleeps, "running")
            for box in (sleeps, api.create(snapshot_id=snapshot)):
                assert api.read(box, "/home/user/kept") == "bytes"
        (server.state / "disks" / "earlier").rmdir()
    finally:
        server.stop()
