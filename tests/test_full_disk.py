"""A disk that is full under the store, or under the journals: nothing confirmed is lost, and room is all it takes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.actor import counted
from support.api import Api
from support.disk import Disk, small_disk
from support.reader import Reader
from support.server import Server
from support.until import until

pytestmark = pytest.mark.box
RESERVE = "the server lives on what it had kept for itself"


@pytest.fixture
def disk() -> Iterator[Disk]:
    with small_disk(64) as disk:
        yield disk


@pytest.fixture
def server(disk: Disk) -> Iterator[Server]:
    """A server whose whole state lies on the small disk."""
    server = Server()
    server.state = disk.folder / "state"
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def with_journals(disk: Disk) -> Iterator[Server]:
    """A server whose journals alone lie on the small disk."""
    server = Server()
    server.state.mkdir(mode=0o700)
    (disk.folder / "journals").mkdir()
    (server.state / "journals").symlink_to(disk.folder / "journals")
    try:
        yield server.start()
    finally:
        server.stop()


def _until_logged(server: Server, event: str) -> None:
    """Wait until the server says this; nothing else tells that it tries again by itself."""
    until(lambda: event in server.log.read_text(), f"{event!r} was never said: {server.tail()}")


def _fill(server: Server, disk: Disk) -> None:
    """Leave not even what the server keeps for itself."""
    disk.fill()
    (server.state / "reserve").unlink(missing_ok=True)
    disk.fill()


def test_what_the_server_keeps_for_itself_lets_it_store_what_happens(server: Server, disk: Disk) -> None:
    """Also when it is started anew with a disk that others have filled."""
    with server.api() as api:
        box, other = api.create(), api.create()
        disk.fill()
        _until_logged(server, RESERVE)
        assert api.output(box, "echo runs") == "runs\n"
        api.shutdown(box)
        disk.free()
        while not (server.state / "reserve").exists():
            assert server.running()
        server.kill()
        disk.fill()
        server.start()
        api.shutdown(other)


def test_a_full_disk_under_the_store_refuses_in_words_and_needs_room_alone(server: Server, disk: Disk) -> None:
    with server.api() as api:
        box = api.create()
        path = f"/v1/devboxes/{box}"
        fed = api.start(box, "cat; exit 3", attach_stdin=True)
        assert api.send(box, fed, "before\n")
        ends = api.start(box, "until [ -e /dev/shm/go ]; do sleep 0.02; done; exit 7")
        Reader(server, box, fed).until(lambda r: r.text == "before\n")
        _fill(server, disk)
        for where, body in {
            "/v1/devboxes": {"name": "no room"},
            f"{path}/execute_async": {"command": "echo no room >> log"},
            f"{path}/executions/{fed}/send_std_in": {"text": "no room\n"},
            f"{path}/shutdown": None,
            path: {"name": "no room"},
        }.items():
            answer = api.http.post(where, json=body)
            assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true"), f"{where}: {answer.text}"
            assert "full" in api.refused("POST", where, 503, body)
        file = {"file_path": "file", "contents": "no room"}
        assert "disk is full" in api.refused("POST", f"{path}/write_file_contents", 507, file)
        api.write(box, "/dev/shm/go", "")
        _until_logged(server, "cannot store a change; trying again")
        assert api.execution(box, fed)["stdout"] == "before\n", "what needs no room is answered"
        assert [view["name"] for view in api.boxes()] == [None]
        disk.free()
        assert api.wait(box, ends)["exit_status"] == 7
        assert api.send(box, fed, "after\n")
        assert api.send(box, fed, signal="EOF")
        view = api.wait(box, fed)
        assert (view["exit_status"], view["stdout"]) == (3, "before\nafter\n")
        assert api.run(box, "test ! -e log")["exit_status"] == 0, "what was refused did not happen"


def test_a_start_on_a_full_disk_says_so_and_loses_nothing(server: Server, disk: Disk) -> None:
    with server.api() as api:
        box = api.create()
        execution = api.start(box, "echo first; read line; echo $line; exit 5", attach_stdin=True)
        assert api.send(box, execution, "confirmed\n")
    _fill(server, disk)
    server.kill()
    command = [server.program, "serve", "--port", str(server.port), "--state", server.state]
    refused = subprocess.run(command, capture_output=True, text=True, env=server.environment(), timeout=60, check=False)
    assert refused.returncode == 2
    assert f"cannot serve: Disk space: the disk of {server.state} is full" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1, refused.stderr
    disk.free()
    server.start()
    with server.api() as api:
        assert api.box(box)["status"] == "running"
        view = api.wait(box, execution)
        assert (view["exit_status"], view["stdout"]) == (5, "first\nconfirmed\n")


def test_a_full_disk_under_the_journals_makes_commands_wait(with_journals: Server, disk: Disk) -> None:
    """Also while the server is killed and started again: the agent keeps what the journal did not take."""
    server = with_journals
    with server.api() as api:
        box = api.create()
        waiting = api.start(box, "until [ -e go ]; do sleep 0.02; done; seq 300000; seq 1000 >&2; touch done; exit 4")
        fed = api.start(box, "cat; exit 6", attach_stdin=True)
        assert api.send(box, fed, "before\n")
        Reader(server, box, fed).until(lambda r: r.text == "before\n")
        disk.fill()
        api.write(box, "go", "")
        _until_logged(server, "a journal cannot be written; its command waits")
        assert api.send(box, fed, "x" * 100_000) is False, "there is no room for it, and nothing was taken"
        server.restart()
    with server.api() as api:
        assert api.run(box, "test ! -e done")["exit_status"] == 0, "commands without output do not need room"
        assert api.execution(box, waiting)["status"] == "running"
        disk.free()
        view = api.wait(box, waiting)
        assert view["exit_status"] == 4
        assert api.streamed(box, waiting) == counted("", 300_000)
        assert api.streamed(box, waiting, "stderr") == counted("", 1000)
        assert api.send(box, fed, "after\n")
        assert api.send(box, fed, signal="EOF")
        view = api.wait(box, fed)
        assert (view["exit_status"], view["stdout"]) == (6, "before\nafter\n")


@pytest.fixture
def large() -> Iterator[Disk]:
    """A disk on which the pool of disks is a file."""
    with small_disk(3072) as disk:
        yield disk


def test_a_full_disk_under_the_pool_costs_no_devbox_its_disk(large: Disk) -> None:
    """Each byte of the pool has a block below, so boxes write on until it is full, and meet nothing but that."""
    server = Server()
    server.state = large.folder / "state"
    try:
        with server.start().api() as api:
            boxes = box, other, asleep = api.create(), api.create(), api.create()
            digest = api.output(box, "head -c 50M /dev/urandom | tee kept | sha256sum; sync")
            large.fill()
            _until_logged(server, RESERVE)
            assert api.output(box, "head -c 50M /dev/zero >some && sync && stat -c %s some") == f"{50 << 20}\n"
            writing = [(one, api.start(one, FLOOD)) for one in boxes]
            for one, execution in writing:
                said = api.wait(one, execution, 120)
                assert said["stderr"].count("No space left") == 3, said
                assert "synced" in said["stdout"], said
            assert api.output(box, "sha256sum <kept") == digest
            assert api.http.get("/healthz").status_code == 200
            assert "full" in api.refused("POST", f"/v1/devboxes/{box}/snapshot_disk", 503)
            assert "full" in api.refused("POST", "/v1/devboxes", 503, {"name": "no room"})
            api.call("POST", f"/v1/devboxes/{asleep}/suspend")
            api.wait_box(asleep, "suspended")
            server.restart()
            api.call("POST", f"/v1/devboxes/{asleep}/resume")
            api.wait_box(asleep, "running")
            assert api.output(box, "rm -f more some && sha256sum <kept") == digest
            api.shutdown(other)
            large.free()
            more = "head -c 200M /dev/zero >more && sync && stat -c %s more"
            deadline = time.monotonic() + 60  # the kernel gives back later what is gone
            while (said := api.run(box, more))["exit_status"]:
                assert time.monotonic() < deadline, said
            assert said["stdout"] == f"{200 << 20}\n"
            assert api.output(box, "sha256sum <kept") == digest
            assert api.output(api.create(), "echo room >file && cat file") == "room\n"
            assert server.terminate() < 5
            assert "Traceback" not in server.log.read_text()
            server.start()
    finally:
        server.stop()


FLOOD = "for n in 1 2 3; do rm -f more; cat /dev/zero >more; sync; done; sync && echo synced"


def test_a_pool_that_is_filled_while_no_server_runs_harms_none(large: Disk) -> None:
    """What boxes may still take is kept by the kernel, and is there."""
    server = Server()
    server.state = large.folder / "state"
    try:
        with server.start().api() as api:
            boxes = [api.create() for _ in range(3)]
            snapshot = api.call("POST", f"/v1/devboxes/{boxes[0]}/snapshot_disk")["id"]
            boxes.append(api.create(snapshot_id=snapshot))
            api.output(boxes[1], "head -c 300M /dev/urandom >kept; sync; sha256sum <kept >digest")
            for one in boxes:
                api.output(one, "hostname >mine && sync mine")
            flood = "until [ -e /dev/shm/go ]; do sleep 0.02; done; cat /dev/zero >more; sync -f . && echo synced"
            flood = f"{flood}; touch /dev/shm/done"
            writing = [(one, api.start(one, flood)) for one in boxes]
            server.kill()
            large.fill()
            for one in boxes:
                inside = ("nsenter", f"--target={_pid(server, one)}", "--user", "--mount", "--setuid=0", "--setgid=0")
                subprocess.run([*inside, "touch", "/dev/shm/go"], check=True)
            deadline = time.monotonic() + 120
            while not all((_root(server, one) / "dev/shm/done").exists() for one in boxes):
                assert time.monotonic() < deadline, "the boxes are still writing"
                time.sleep(0.02)
            server.start()
            for one, execution in writing:
                said = api.wait(one, execution, 120)
                assert said["stderr"].count("No space left") == 1, said
                assert "synced" in said["stdout"], said
            server.restart()
            for one in boxes:
                assert api.output(one, "hostname | cmp - mine && echo same") == "same\n"
                assert api.output(one, "if echo a >>more; then echo room; fi 2>&1 | grep -ci read-only || :") == "0\n"
            assert api.run(boxes[1], "sha256sum <kept | cmp - digest")["exit_status"] == 0
            large.free()
            for one in boxes:
                assert api.output(one, "rm more; echo room >file && sync file && cat file") == "room\n"
    finally:
        server.stop()


def _pid(server: Server, box: str) -> int:
    """The first process of a living box."""
    return int(json.loads((server.boxes / box / "box.json").read_text())["pid"])


def _root(server: Server, box: str) -> Path:
    """What a living box sees, whether its server lives or not."""
    return Path("/proc", str(_pid(server, box)), "root")


@pytest.mark.parametrize("end", ["kill", "terminate"])
@pytest.mark.parametrize("command", [False, True], ids=["serve", "storage recover"])
def test_a_broken_pool_is_told_within_a_second_and_the_next_start_recovers_it(command: bool, end: str) -> None:
    """Its file is cut short below the living boxes, by a part in which nothing lies yet."""
    server = Server(warm_boxes="1")
    try:
        with server.start().api() as api:
            box = api.create()
            api.output(box, "echo kept >kept; sync")
            subprocess.run(["sync"], check=True)
            file = server.state / "pool.btrfs"
            with file.open("r+b") as opened:
                opened.truncate(file.stat().st_size - (64 << 20))
            assert "cut short" in _until_unhealthy(api)
            assert "devboxd_pool_writable 0.0" in api.http.get("/metrics").text
            assert "cut short" in api.refused("POST", "/v1/devboxes", 503, {"name": "broken"})
            assert any("cut short" in str(line["message"]) for line in _log_of(api, box))
            assert "cut short" in _doctor(server)
            assert "trouble      the pool's file" in _told(server, 1, "storage", "status").splitlines()[0]
            assert "cut short" in _told(server, 2, "storage", "check")
            getattr(server, end)()
            if command:
                assert box in server.command("storage", "recover", "--state", str(server.state))
                again = server.command("storage", "recover", "--state", str(server.state))
                assert again == "the storage works; nothing was to be done\n"
            server.start()
            assert api.wait_box(box, "suspended")
            assert api.http.get("/healthz").status_code == 200
            api.call("POST", f"/v1/devboxes/{box}/resume")
            api.wait_box(box, "running")
            assert api.output(box, "cat kept") == "kept\n"
            assert server.terminate() < 5
            assert "Traceback" not in server.log.read_text()
            server.start()
    finally:
        server.stop()


@pytest.mark.parametrize("end", ["kill", "terminate"])
@pytest.mark.parametrize("command", ["serve", "storage recover"])
@pytest.mark.parametrize("fail", ["end_writing", "shut_down"])
def test_a_disk_that_fails_below_everything_costs_no_devbox(large: Disk, fail: str, command: str, end: str) -> None:
    """It is let go of, so that it can be unmounted, checked and mounted again; then the devboxes are resumed."""
    server = Server(warm_boxes="1")
    server.state = large.folder / "state"
    try:
        with server.start().api() as api:
            box = api.create()
            api.output(box, "echo kept >kept; sync -f .")
            subprocess.run(["sync", "--file-system", server.state / "disks", large.folder], check=True)
            getattr(large, fail)()
            assert "disk" in _until_unhealthy(api)
            assert "disk" in api.refused("POST", "/v1/devboxes", 503, {"name": "broken"})
            getattr(server, end)()
        assert "Traceback" not in server.log.read_text()
        said = _refused(server, *command.split())
        assert ("read-only" if fail == "end_writing" else "fails") in said
        assert box in said
        assert box not in _refused(server, "serve"), "it was ended before"
        large.mend()
        server.start()
        with server.api() as api:
            api.wake(box)
            assert api.http.get("/healthz").status_code == 200
            assert api.output(box, "cat kept") == "kept\n"
    finally:
        server.stop()


def test_a_half_made_box_does_not_hold_a_disk_that_fails(large: Disk) -> None:
    """A server that was killed while it made one has not written down yet which process that is."""
    server = Server()
    server.state = large.folder / "state"
    try:
        with server.start().api() as api:
            box, half_made = api.create(), api.create()
            record = server.boxes / half_made / "box.json"
            subprocess.run(["sync", "--file-system", server.state / "disks", large.folder], check=True)
            large.shut_down()
            _until_unhealthy(api)
            server.kill()
        record.unlink()
        said = _refused(server, "storage", "recover")
        assert "fails" in said
        assert box in said
        large.mend()
        server.start()
        with server.api() as api:
            api.wake(box)
    finally:
        server.stop()


def test_a_devbox_that_ends_because_the_disk_fails_is_suspended(large: Disk) -> None:
    """Also when an operator ends its first process by hand, with a server or without one."""
    server = Server()
    server.state = large.folder / "state"
    try:
        with server.start().api() as api:
            boxes = [api.create(), api.create()]
            subprocess.run(["sync", "--file-system", server.state / "disks", large.folder], check=True)
            large.shut_down()
            _until_unhealthy(api)
            _end_by_hand(server, boxes[0])
            server.kill()
        _end_by_hand(server, boxes[1])
        _refused(server, "storage", "recover")
        large.mend()
        server.start()
        with server.api() as api:
            for box in boxes:
                api.wait_box(box, "suspended")
    finally:
        server.stop()


def _until_unhealthy(api: Api) -> str:
    """Within a second, of a machine on which nothing else runs."""
    deadline = time.monotonic() + 10
    while (answer := api.http.get("/healthz")).status_code != 503:
        assert time.monotonic() < deadline, "the failure is not noticed"
        time.sleep(0.02)
    return answer.text


def _end_by_hand(server: Server, box: str) -> None:
    first = os.pidfd_open(_pid(server, box))
    signal.pidfd_send_signal(first, signal.SIGKILL)
    select.select([first], [], [])
    os.close(first)


def _refused(server: Server, *words: str) -> str:
    """What a command says that cannot do its work: one sentence, and exit code 2."""
    command = [server.program, *words, "--state", str(server.state)]
    command += ["--port", str(server.port)] if words == ("serve",) else []
    done = subprocess.run(command, capture_output=True, text=True, env=server.environment(), timeout=120, check=False)
    assert done.returncode == 2, done
    assert done.stderr.splitlines()[-1].startswith("cannot "), done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def _told(server: Server, code: int, *words: str) -> str:
    """What a command says of the state folder, with this exit code and no traceback."""
    command = [server.program, *words, "--state", str(server.state)]
    done = subprocess.run(command, capture_output=True, text=True, env=server.environment(), timeout=120, check=False)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def _doctor(server: Server) -> str:
    """What doctor says. It is no error: `serve` can start, and recovers the storage then."""
    command = [server.program, "doctor"]
    environment = {**server.environment(), "DEVBOXD_STATE": str(server.state)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def _log_of(api: Api, box: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.call("GET", f"/v1/devboxes/{box}/logs")["logs"]
    return found


@contextlib.contextmanager
def crowded(gigabytes: int) -> Iterator[tuple[Server, Api, list[str]]]:
    """A server on a disk of this size, with six devboxes of 2 GiB each."""
    with small_disk(gigabytes << 10) as disk:
        server = Server()
        server.state = disk.folder / "state"
        try:
            with server.start().api() as api:
                yield server, api, [api.create(launch_parameters=SMALLEST) for _ in range(6)]
        finally:
            server.stop()


SMALLEST = {
    "resource_size_request": "CUSTOM_SIZE",
    "custom_cpu_cores": 1,
    "custom_gb_memory": 2,
    "custom_disk_size": 2,
}


def _left(server: Server, box: str) -> int:
    """Bytes that a living box may still write, as `df` shows them in it, whether the server lives or not."""
    found = os.statvfs(_root(server, box))
    return found.f_bavail * found.f_frsize


def test_the_one_that_writes_has_all_of_its_disk_while_the_others_rest() -> None:
    """At the speed of the disk, by what is promised to those that do not write; and they can still write."""
    with crowded(6) as (server, api, (first, *others)):
        assert sum(_left(server, box) for box in (first, *others)) < 6 << 30, "no more is promised than there is"
        assert api.output(first, "head -c 8M /dev/zero >little && stat -c %s little") == f"{8 << 20}\n"
        deadline = time.monotonic() + 30
        while _left(server, first) < 1700 << 20:
            assert time.monotonic() < deadline, f"{_left(server, first)} bytes are left to it"
            time.sleep(0.01)
        assert api.run(first, "fallocate -l 1700M much && rm much")["exit_status"] == 0
        written = api.run(first, "head -c 1700M /dev/zero >much && sync -f . && stat -c %s much", 120)
        assert written["stdout"] == f"{1700 << 20}\n", written
        for box in others:
            assert _left(server, box) > 128 << 20
            assert api.output(box, "head -c 64M /dev/zero >some && sync -f . && stat -c %s some") == f"{64 << 20}\n"


@pytest.mark.parametrize("killed", [False, True], ids=["", "after the process that waits for its end was killed"])
def test_without_a_server_no_more_is_promised_than_the_pool_has(killed: bool) -> None:
    """However it ends: it alone lets the pool grow. What boxes may then write has its blocks."""
    with crowded(12) as (server, _, boxes):
        room = os.statvfs(server.state / "disks")
        assert all(_left(server, box) > 1 << 30 for box in boxes)
        if killed:
            first = _waiting(server)
            os.kill(first, signal.SIGKILL)
            until(lambda: _waiting(server) not in (0, first), "another one waits for the end of the server")
            until(lambda: _calls(_waiting(server)) > 64, "it has heard the bounds")
        server.kill()
        deadline = time.monotonic() + 30
        while (left := sum(_left(server, box) for box in boxes)) > room.f_bavail * room.f_frsize:
            assert time.monotonic() < deadline, f"{left} bytes are promised"
            time.sleep(0.01)


def _calls(pid: int) -> int:
    """How often a process has read; a shell reads a line byte by byte."""
    return int(re.search(r"syscr: (\d+)", Path("/proc", str(pid), "io").read_text())[1])


def _waiting(server: Server) -> int:
    """The process that bounds disks when the server has ended; 0 when there is none."""
    for task in Path("/proc", str(server.pid), "task").iterdir():
        for pid in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if b"reserved_clusters" in Path("/proc", pid, "cmdline").read_bytes():
                    return int(pid)
    return 0


@pytest.mark.parametrize("end", ["kill", "terminate"])
@pytest.mark.parametrize("fail", ["fill", "end_writing", "shut_down"])
def test_every_command_says_in_a_sentence_that_the_disk_is_full_or_fails(large: Disk, fail: str, end: str) -> None:
    """Beside a server that runs, without one, and when one is to be started."""
    server = Server()
    server.state = large.folder / "state"
    try:
        with server.start().api() as api:
            box = api.create()
            api.output(box, "echo kept >kept; sync -f .")
            subprocess.run(["sync", "--file-system", server.state / "disks", large.folder], check=True)
            getattr(large, fail)()
            if fail == "fill":
                _fill(server, large)
            else:
                _until_unhealthy(api)
            _try_all(server)
            for path in ("", "/v1/devboxes", f"/v1/devboxes/{box}", "/metrics", "/healthz"):
                assert api.http.get(path).status_code < 600
            api.http.post("/v1/devboxes", json={"name": "no room"})
            getattr(server, end)()
            said = server.log.read_text()
            assert "raceback" not in said, said
            _try_all(server)
            _refused(server, "serve")
            _try_all(server)
        large.free() if fail == "fill" else large.mend()
        server.start()
        with server.api() as api:
            if fail != "fill":
                api.wake(box)
            assert api.output(box, "cat kept") == "kept\n"
    finally:
        server.stop()


def _try_all(server: Server) -> None:
    """All commands that look at the state folder; what cannot be done is told in a sentence."""
    for words in (
        ("storage", "status"),
        ("storage", "status", "--json"),
        ("storage", "check"),
        ("storage", "grow", "64G"),
        ("storage", "recover"),
        ("keys", "list"),
        ("keys", "create", "--name", "more"),
        ("backup", str(server.folder / "backup")),
        ("doctor",),
    ):
        option = () if words == ("doctor",) else ("--state", str(server.state))
        environment = {**server.environment(), "DEVBOXD_STATE": str(server.state)}
        command = [server.program, *words, *option]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode in (0, 1, 2), (words, done)
        assert "Traceback" not in done.stderr, (words, done.stderr)
        if done.returncode == 2 and words != ("doctor",):  # doctor tells all that it finds, in a form of its own
            assert done.stderr.splitlines()[-1].startswith("cannot "), (words, done)
        shutil.rmtree(server.folder / "backup", ignore_errors=True)
