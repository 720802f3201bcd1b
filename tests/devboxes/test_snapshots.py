"""Snapshots of disks: one instant, whole, independent of where they came from, and settled after a crash."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.api import Api
from support.disks import upper
from support.server import Server

pytestmark = pytest.mark.box
SNAPSHOTS = "/v1/devboxes/disk_snapshots"
NOBODY = "snp_" + "0" * 21


def take(api: Api, box: str, **body: Any) -> Any:
    """A snapshot that is complete; its view."""
    return api.call("POST", f"/v1/devboxes/{box}/snapshot_disk", body)


def status(api: Api, snapshot: str) -> Any:
    return api.call("GET", f"{SNAPSHOTS}/{snapshot}/status")


def delete(api: Api, snapshot: str) -> None:
    api.call("POST", f"{SNAPSHOTS}/{snapshot}/delete")


def test_it_holds_the_disk_as_it_was_and_shares_nothing(api: Api, box: str) -> None:
    api.run(
        box, "echo one >/tmp/t; echo one >~/h; sudo rm /etc/motd; ln -s /etc ~/link; mkfifo ~/pipe; echo s >~/s; rm ~/s"
    )
    snapshot = take(api, box)
    api.run(box, "echo two >/tmp/t; rm ~/h")
    first, second = (api.create(snapshot_id=snapshot["id"]) for _ in range(2))
    look = "cat /tmp/t ~/h; ls /etc/motd ~/s 2>&1 | wc -l; readlink ~/link; test -p ~/pipe; stat -c %U:%a /tmp/t"
    seen = api.output(first, look + "; hostname").splitlines()
    assert seen[:5] == ["one", "one", "2", "/etc", "user:644"]
    assert seen[5] == "devbox-" + first[4:].lower()
    assert api.output(first, f"getent hosts {seen[5]} | wc -l") == "1\n"
    api.run(first, "echo first >/tmp/t")
    assert api.output(second, "cat /tmp/t") == "one\n"
    assert api.output(box, "cat /tmp/t") == "two\n"
    assert api.box(first)["snapshot_id"] == snapshot["id"]
    delete(api, snapshot["id"])
    assert api.output(second, "cat /tmp/t") == "one\n"
    again = api.create(snapshot_id=take(api, first)["id"])
    assert api.output(again, "cat /tmp/t") == "first\n"
    for one in (first, second, again):
        api.shutdown(one)


def test_names_of_its_own_stand_where_the_source_had_deep_folders(api: Api, box: str) -> None:
    deep = "import os; os.unlink('/etc/hosts')\nfor name in ['/etc/hosts', *1500 * 'd']: os.mkdir(name), os.chdir(name)"
    assert api.run(box, f'sudo python3 -c "{deep}"')["exit_status"] == 0
    snapshot = take(api, box)["id"]
    fork = api.create(snapshot_id=snapshot)
    assert api.output(fork, "grep -c $(hostname) /etc/hosts") == "1\n"
    api.shutdown(fork)


def test_a_running_command_is_not_stopped_and_what_it_wrote_is_there(api: Api, box: str) -> None:
    execution = api.start(box, "for i in $(seq 400); do echo $i >>/tmp/counted; echo $i; sleep 0.005; done")
    with api.stream(box, execution) as events:
        next(events)
        snapshot = take(api, box)
    assert api.wait(box, execution)["exit_status"] == 0
    fork = api.create(snapshot_id=snapshot["id"])
    counted = api.output(fork, "cat /tmp/counted").split()
    assert counted == [str(number) for number in range(1, len(counted) + 1)]
    assert 1 <= len(counted) <= 400
    api.shutdown(fork)


def test_its_labels_are_kept_changed_and_listed(api: Api, box: str) -> None:
    mark = uuid.uuid4().hex
    metadata = {"mark": mark, "odd \"key'": "x,y", "kind": "a", "a/b": mark}
    one = take(api, box, name="one", commit_message="why", metadata=metadata)
    two = take(api, box, metadata={"mark": mark, "kind": "b"})
    assert (one["name"], one["commit_message"], one["metadata"]) == ("one", "why", metadata)
    assert (two["name"], two["commit_message"], two["source_devbox_id"]) == (None, None, box)
    assert status(api, one["id"]) == {"status": "complete", "snapshot": one, "error_message": None}

    def found(**query: str) -> list[str]:
        return [view["id"] for view in api.call("GET", SNAPSHOTS, params=query)["snapshots"]]

    assert found(**{"metadata[mark]": mark}) == [two["id"], one["id"]]
    assert found(**{"metadata[mark]": mark, "metadata[kind][in]": "a,c"}) == [one["id"]]
    assert found(**{"metadata[odd \"key']": "x,y"}) == [one["id"]]
    assert found(devbox_id="dbx_" + "0" * 21) == []
    page = api.call("GET", SNAPSHOTS, params={"metadata[mark]": mark, "limit": 1})
    assert (page["has_more"], page["total_count"], len(page["snapshots"])) == (True, 2, 1)
    assert found(**{"metadata[mark]": mark, "starting_after": two["id"]}) == [one["id"]]
    keys = api.call("GET", f"{SNAPSHOTS}/metadata/keys")["keys"]
    assert {"mark", "kind", "odd \"key'", "a/b"} <= set(keys)
    kinds = api.call("GET", f"{SNAPSHOTS}/metadata/keys/kind/values")
    assert kinds["key"] == "kind"
    assert {"a", "b"} <= set(kinds["values"])
    slashed = api.call("GET", f"{SNAPSHOTS}/metadata/keys/a%2Fb/values")
    assert slashed["key"] == "a/b"
    assert mark in slashed["values"]
    public = api.call("GET", f"{SNAPSHOTS}/public/metadata/keys/a%2Fb%20%C3%A4/values")
    assert public == {"key": "a/b ä", "values": []}
    assert api.call("GET", f"{SNAPSHOTS}/list_public")["snapshots"] == []
    for nothing in ({}, {"name": None, "metadata": None, "commit_message": None}):
        assert api.call("POST", f"{SNAPSHOTS}/{one['id']}", nothing) == one
    changed = api.call("POST", f"{SNAPSHOTS}/{one['id']}", {"name": "", "metadata": {"kind": "z"}})
    assert (changed["name"], changed["commit_message"], changed["metadata"]) == (None, "why", {"kind": "z"})
    emptied = api.call("POST", f"{SNAPSHOTS}/{one['id']}", {"metadata": {}, "commit_message": ""})
    assert (emptied["name"], emptied["commit_message"], emptied["metadata"]) == (None, None, {})
    delete(api, one["id"])
    delete(api, two["id"])


def test_a_deleted_one_says_so_and_is_used_no_more(api: Api, box: str, server: Server) -> None:
    snapshot = take(api, box)["id"]
    for _ in range(2):
        delete(api, snapshot)
        assert status(api, snapshot) == {"status": "deleted", "snapshot": None, "error_message": None}
    assert not (server.state / "disks" / snapshot).exists()
    assert "deleted" in api.refused("POST", "/v1/devboxes", 400, {"snapshot_id": snapshot})
    assert "deleted" in api.refused("POST", f"{SNAPSHOTS}/{snapshot}", 404, {"name": "x"})
    assert snapshot not in [view["id"] for view in api.call("GET", SNAPSHOTS, params={"limit": 5000})["snapshots"]]


def test_one_that_failed_says_why_until_it_is_deleted(api: Api, box: str, server: Server) -> None:
    snapshot = take(api, box)["id"]
    failed = "update snapshots set status = 'error', error = 'the disk broke' where id = ?"
    with contextlib.closing(sqlite3.connect(server.state / "devboxd.db")) as store, store:
        store.execute(failed, (snapshot,))
    assert status(api, snapshot) == {"status": "error", "snapshot": None, "error_message": "the disk broke"}
    assert snapshot not in [view["id"] for view in api.call("GET", SNAPSHOTS, params={"limit": 5000})["snapshots"]]
    delete(api, snapshot)
    assert status(api, snapshot) == {"status": "deleted", "snapshot": None, "error_message": None}


def test_bad_input_is_refused_and_changes_nothing(api: Api, box: str) -> None:
    before = api.call("GET", SNAPSHOTS)["total_count"]
    path = f"/v1/devboxes/{box}/snapshot_disk"
    assert "commit_message" in api.refused("POST", path, 400, {"commit_message": "x" * 1001})
    assert "metadata" in api.refused("POST", path, 400, {"metadata": {str(i): "x" for i in range(10_000)}})
    api.refused("POST", "/v1/devboxes/dbx_" + "0" * 21 + "/snapshot_disk", 404)
    api.refused("POST", "/v1/devboxes/nonsense/snapshot_disk", 400)
    ended = api.create()
    api.shutdown(ended)
    assert "ended" in api.refused("POST", f"/v1/devboxes/{ended}/snapshot_disk_async", 400)
    asleep = api.create()
    api.call("POST", f"/v1/devboxes/{asleep}/suspend")
    api.wait_box(asleep, "suspended")
    assert "resume" in api.refused("POST", f"/v1/devboxes/{asleep}/snapshot_disk", 400)
    api.shutdown(asleep)
    api.refused("GET", f"{SNAPSHOTS}/{NOBODY}/status", 404)
    api.refused("POST", f"{SNAPSHOTS}/{NOBODY}/delete", 404)
    api.refused("POST", f"{SNAPSHOTS}/{NOBODY}", 404, {"name": "x"})
    api.refused("GET", f"{SNAPSHOTS}/{box}/status", 400)
    for listed in (SNAPSHOTS, f"{SNAPSHOTS}/list_public"):
        for query in ({"limit": 0}, {"limit": 5001}, {"starting_after": "nonsense"}, {"starting_after": box}):
            assert str(*query.values()) in api.refused("GET", listed, 400, params=query)
    assert "dbx_" in api.refused("GET", SNAPSHOTS, 400, params={"devbox_id": "nonsense"})
    assert "snapshot" in api.refused("POST", "/v1/devboxes", 404, {"snapshot_id": NOBODY})
    assert "snp_" in api.refused("POST", "/v1/devboxes", 400, {"snapshot_id": "latest"})
    assert api.call("GET", SNAPSHOTS)["total_count"] == before


def test_the_size_is_what_it_holds_over_its_image(api: Api) -> None:
    box = api.create()
    small = take(api, box)["size_bytes"]
    api.run(box, "head -c 20000000 /dev/urandom >/tmp/large; sync")
    large = take(api, box)["size_bytes"]
    if small is None:
        pytest.skip("this machine has no btrfs, and plain folders do not count")
    assert small < 1_000_000
    assert 20_000_000 <= large < 21_000_000
    api.shutdown(box)


def test_its_digest_is_of_all_that_it_holds_and_shows_when_that_changes(
    api: Api, server: Server, box: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.run(
        box, "mkdir -p ~/d; echo one >~/d/f; ln -s /etc ~/d/l; mkfifo ~/d/p; truncate -s 4T ~/d/hole; chmod 711 ~/d"
    )
    first, again = take(api, box)["id"], take(api, box)["id"]
    assert status(api, first)["snapshot"]["manifest_digest"] is None
    told = api.call("GET", f"{SNAPSHOTS}/{first}/status", params={"include_manifest_digest": True})["snapshot"][
        "manifest_digest"
    ]
    assert len(bytes.fromhex(told)) == 32
    assert status(api, first)["snapshot"]["manifest_digest"] == told
    intact = {"id": again, "intact": True, "manifest_digest": told, "found_digest": told}
    assert api.call("POST", f"{SNAPSHOTS}/{again}/verify", {}) == intact
    for change in ("chmod 700 ~/d", "touch -d @1 ~/d/f", "echo two >~/d/f", "mv ~/d/f ~/d/g", "sudo rm /etc/motd"):
        api.run(box, change)
        other = api.call("POST", f"{SNAPSHOTS}/{take(api, box)['id']}/verify", {})["found_digest"]
        assert other != told, change
    disk = server.state / "disks" / first
    subprocess.run(["btrfs", "property", "set", disk, "ro", "false"], check=True)
    with upper(server.state, first, write=True) as folder:
        (folder / "home/user/d/f").write_text("one?")
    found = api.call("POST", f"{SNAPSHOTS}/{first}/verify", {})
    assert (found["intact"], found["manifest_digest"]) == (False, told)
    monkeypatch.setenv("DEVBOXD_URL", server.url)
    monkeypatch.setenv("DEVBOXD_KEY", server.key)
    verify = subprocess.run(
        [server.program, "snapshot", "verify", again, first], capture_output=True, text=True, check=False
    )
    assert (verify.returncode, verify.stderr) == (1, "")
    assert [line.split("\t")[:2] for line in verify.stdout.splitlines()] == [[again, "intact"], [first, "CHANGED"]]
    listed = subprocess.run(
        [server.program, "snapshot", "list", "--devbox", box], capture_output=True, text=True, check=False
    )
    assert {first, again} <= {line.split("\t")[0] for line in listed.stdout.splitlines()}


def test_only_what_is_complete_is_verified(api: Api, box: str) -> None:
    gone = take(api, box)["id"]
    delete(api, gone)
    assert "was deleted" in api.refused("POST", f"{SNAPSHOTS}/{gone}/verify", 404, {})
    assert status(api, gone)["snapshot"] is None
    assert "cannot" in api.refused("POST", f"{SNAPSHOTS}/{NOBODY}/verify", 404, {})


def test_a_repeated_request_takes_one(api: Api, box: str) -> None:
    headers = {"x-request-id": str(uuid.uuid4())}
    views = [api.call("POST", f"/v1/devboxes/{box}/snapshot_disk_async", {}, headers=headers) for _ in range(2)]
    assert views[0]["id"] == views[1]["id"]


def test_a_crash_leaves_each_complete_or_in_error_and_nothing_else(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        api.run(box, "for i in $(seq 50); do head -c 100000 /dev/urandom >/tmp/$i; done; cd /tmp; sha256sum * >~/sums")
        kept = take(api, box)["id"]
        begun = [api.call("POST", f"/v1/devboxes/{box}/snapshot_disk_async", {})["id"] for _ in range(8)]
        with contextlib.suppress(httpx.TimeoutException):  # it is begun or not: nobody is told
            api.http.post(f"/v1/devboxes/{box}/snapshot_disk_async", json={}, timeout=0.001)
    own_server.kill()
    own_server.start()
    with own_server.api() as api:
        settled = {snapshot: status(api, snapshot)["status"] for snapshot in (kept, *begun)}
        assert settled[kept] == "complete"
        assert set(settled.values()) <= {"complete", "error"}
        listed = {view["id"] for view in api.call("GET", SNAPSHOTS)["snapshots"]}
        on_disk = {path.name for path in (own_server.state / "disks").glob("snp_*")}
        assert on_disk == listed
        for snapshot in listed:
            fork = api.create(snapshot_id=snapshot)
            assert api.run(fork, "cd /tmp && sha256sum --quiet -c ~/sums")["exit_status"] == 0
            api.shutdown(fork)


def test_a_devbox_begins_or_the_snapshot_goes_never_both(api: Api, box: str) -> None:
    """Asked for at the same moment: one of the two is refused, or the devbox has its disk already."""

    def create(snapshot: str) -> Any:
        return api.http.post("/v1/devboxes", json={"snapshot_id": snapshot})

    def remove(snapshot: str) -> Any:
        return api.http.post(f"{SNAPSHOTS}/{snapshot}/delete", json={})

    made = []
    with ThreadPoolExecutor(4) as pool:
        for order in ((create, remove, create), (remove, create, create)) * 6:
            snapshot = take(api, box)["id"]
            answers = [one.result() for one in [pool.submit(ask, snapshot) for ask in order]]
            for answer, asked in zip(answers, order, strict=True):
                assert answer.status_code in ((200, 400) if asked is create else (200, 409)), answer.text
                if asked is create and answer.status_code == 200:
                    made.append(answer.json()["id"])
            for one in answers:
                if one.status_code == 200 and one.json().get("snapshot_id") == snapshot:
                    api.wait_box(one.json()["id"], "running")
                    assert api.output(one.json()["id"], "echo runs") == "runs\n"
            if status(api, snapshot)["status"] != "deleted":
                delete(api, snapshot)
    for fork in made:
        api.shutdown(fork)


def test_without_btrfs_the_disk_is_copied_while_the_box_stands_still(own_server: Server) -> None:
    own_server.terminate()
    subprocess.run(["rm", own_server.state / "pool.btrfs"], check=False)
    (own_server.state / "disks" / "kept").mkdir()  # a folder with plain disks stays one
    own_server.start()
    with own_server.api() as api:
        box = api.create()
        api.run(box, "echo one >/tmp/t; sudo rm /etc/motd; chmod 600 /tmp/t")
        ticking = api.start(box, "while sleep 0.01; do date +%s.%N; done")
        snapshot = take(api, box)
        api.run(box, "echo two >/tmp/t")
        fork = api.create(snapshot_id=snapshot["id"])
        assert api.output(fork, "cat /tmp/t; stat -c %a:%U /tmp/t; ls /etc/motd 2>&1 | wc -l") == "one\n600:user\n1\n"
        api.call("POST", f"/v1/devboxes/{box}/executions/{ticking}/kill")
        api.call("POST", f"/v1/devboxes/{box}/suspend")
        api.wait_box(box, "suspended")
        api.call("POST", f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "running")
        assert api.output(box, "cat /tmp/t") == "two\n"
        delete(api, snapshot["id"])
        assert not (own_server.state / "disks" / snapshot["id"]).exists()
