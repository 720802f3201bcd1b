"""A devbox that takes memory of the kernel which no cgroup counts is ended with the reason, and harms nobody else."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from devboxd.engine.uncounted import Uncounted
from support.api import Api

pytestmark = pytest.mark.box

_MIB = 1 << 20
_UNREAD = """
import socket, struct
request = struct.pack("=IHHII", 32, 18, 1, 1, 0) + struct.pack("=BxHiII", 0, 0, 1, 0, 0)
held = []
while len(held) < 4000:
    held.append(socket.socket(16, 3, 0))
    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
    held[-1].setblocking(False)
    try:
        for _ in range(3000):
            held[-1].send(request)
    except OSError:
        pass
    if len(held) % 50 == 0:
        rows = open("/proc/net/netlink").read().splitlines()[1:]
        if sum(int(row.split()[4]) for row in rows) > 700 << 20:
            break
"""
_LOCKS = """
import fcntl, os, struct
os.mkdir("/tmp/locked")
spots = [struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, spot, 1, 0) for spot in range(400, 0, -2)]
for number in range(15_000):
    file = os.open(f"/tmp/locked/{number}", os.O_RDWR | os.O_CREAT)
    for spot in spots:
        fcntl.fcntl(file, COMMAND, spot)
"""


def unreclaimable() -> int:
    """Bytes that the kernel holds for itself on this machine."""
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return next(int(row[1]) << 10 for row in rows if row[0] == "SUnreclaim:")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (_UNREAD, "netlink sockets keep"),
        (_LOCKS.replace("COMMAND", "fcntl.F_SETLK"), "locks of files"),
        (_LOCKS.replace("COMMAND", "fcntl.F_OFD_SETLK"), "locks of files"),
    ],
    ids=["unread messages", "locks", "locks of descriptors"],
)
def test_who_takes_memory_that_nobody_counts_is_ended_with_the_reason(api: Api, script: str, said: str) -> None:
    """The neighbour, which holds a little of both as programs do, goes on; the machine has its memory back."""
    neighbour, greedy = api.create(name="neighbour"), api.create(name="greedy")
    api.start(
        neighbour, "exec python3 -c 'import socket, time; s = [socket.socket(16, 3) for _ in range(9)]; time.sleep(99)'"
    )
    before, most, over = unreclaimable(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not over.wait(0.05):
            most = max(most, unreclaimable())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        api.write(greedy, "/home/user/take.py", script)
        api.start(greedy, "exec python3 take.py")
        view = api.wait_box(greedy, "failure")
    finally:
        over.set()
        watcher.join()
    assert view["failure_reason"] == "out_of_memory"
    logs = api.call("GET", f"/v1/devboxes/{greedy}/logs")["logs"]
    assert any(said in entry["message"] for entry in logs)
    assert most - before < 650 * _MIB
    assert api.output(neighbour, "echo goes on") == "goes on\n"
    api.shutdown(neighbour)


def fake(folder: Path, unreclaimable_kib: int, unread: int = 0, locks: str = "") -> None:
    """What Uncounted reads, for two boxes with the first processes 10 and 20."""
    (folder / "meminfo").write_text(f"MemTotal: 9 kB\nSUnreclaim:     {unreclaimable_kib} kB\n")
    (folder / "locks").write_text(locks)
    for pid, box in (("10", "one"), ("20", "two"), ("self", None)):
        (folder / pid / "net").mkdir(parents=True, exist_ok=True)
        rows = f"sk Eth Pid Groups Rmem\n0 0 1 0 {unread if box == 'one' else 0} 0\n"
        (folder / pid / "net/netlink").write_text(rows)
        (folder / pid / "mountinfo").write_text(f"1 1 0:6 / /dev\n2 1 0:{100 + (pid == '10')} / /\n")
        (folder / pid / "cgroup").write_text(f"3:cpu:/devboxd-a/boxes/{box}\n" if box else "3:cpu:/\n")


def test_boxes_are_measured_when_the_kernel_has_taken_much_more(tmp_path: Path) -> None:
    """Looked for as long as a box has too much, else not before it has taken as much again."""
    asked = 0

    def living() -> dict[str, int]:
        nonlocal asked
        asked += 1
        return {"one": 10, "two": 20}

    uncounted = Uncounted(tmp_path)
    fake(tmp_path, 200 << 10)
    assert (uncounted.hoarders(living), asked) == ({}, 1)
    fake(tmp_path, 320 << 10, unread=65 * _MIB)
    assert (uncounted.hoarders(living), asked) == ({}, 1)
    fake(tmp_path, 330 << 10, unread=65 * _MIB)
    assert set(uncounted.hoarders(living)) == set(uncounted.hoarders(living)) == {"one"}
    fake(tmp_path, 330 << 10, unread=64 * _MIB)
    assert (uncounted.hoarders(living), asked) == ({}, 4)


def test_locks_count_for_the_box_whose_file_system_or_process_it_is(tmp_path: Path) -> None:
    """Where all boxes see one file system, as that of /dev, the process decides, and nobody else is blamed."""
    own = "1: OFDLCK ADVISORY  WRITE -1 00:65:7 0 0\n"
    shared = "2: POSIX  ADVISORY  READ 20 00:06:7 0 0\n2: -> POSIX ADVISORY READ 10 00:06:7 0 0\n"
    for text, expected in ((own, {"one"}), (shared, {"two"}), (shared.replace(" 20 ", " -1 "), set())):
        fake(tmp_path, 1 << 20, locks=text * 10_001)
        assert set(Uncounted(tmp_path).hoarders(lambda: {"one": 10, "two": 20})) == expected
