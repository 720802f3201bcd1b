"""Devboxes that take all they can get, each in a way of its own, and what a neighbour feels of it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from devboxd.engine import cgroups
from support.api import Api
from support.leftovers import claim_of, groups
from support.server import Server

_SIZE = {"resource_size_request": "CUSTOM_SIZE", "custom_cpu_cores": 2, "custom_gb_memory": 4, "custom_disk_size": 2}
_BEGUN = "the noise has begun"
_MEMORY = """
import os
while True:
    if (child := os.fork()) == 0:
        kept = []
        while True:
            kept.append(b"x" * (1 << 24))
    os.waitpid(child, 0)
"""
_DESCRIPTORS = """
import os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
def fill():
    kept = []
    try:
        while True:
            kept.extend(os.pipe())
    except OSError:
        os._exit(0)
while True:
    for _ in range({processes}):
        if os.fork() == 0:
            fill()
    for _ in range({processes}):
        os.wait()
"""
_MANY_FILES = """
import os
for number in range(4):
    if os.fork() == 0:
        os.makedirs(f"/tmp/files/{number}")
        os.chdir(f"/tmp/files/{number}")
        count = 0
        while True:
            try:
                with open(str(count), "wb") as file:
                    file.write(b"small")
            except OSError:
                pass
            count += 1
os.wait()
"""
_SYNCS = """
import os
for number in range(4):
    if os.fork() == 0:
        file = os.open(f"/tmp/synced{number}", os.O_CREAT | os.O_WRONLY)
        while True:
            os.pwrite(file, os.urandom(4096), 0)
            os.fsync(file)
os.wait()
"""
_HOLES = """
import ctypes, os
call = ctypes.CDLL(None).fallocate
file = os.open("/tmp/holes", os.O_CREAT | os.O_RDWR)
while True:
    for at in range(0, 256 << 20, 1 << 20):
        os.pwrite(file, bytes(1 << 20), at)
    os.fdatasync(file)
    for at in range(0, 256 << 20, 256 << 10):
        call(file, 3, ctypes.c_long(at), ctypes.c_long(128 << 10))
"""
_SYNCFS = """
import ctypes, os
folder, call = os.open("/tmp", os.O_RDONLY), ctypes.CDLL(None).syncfs
for _ in range(8):
    if os.fork() == 0:
        while True:
            call(folder)
os.wait()
"""
_QUESTIONS = """
import socket
server = next(line.split()[1] for line in open("/etc/resolv.conf") if line.startswith("nameserver"))
asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
question = b"\\1\\2\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\7example\\3com\\0\\0\\1\\0\\1"
while True:
    try:
        asking.sendto(question, (server, 53))
    except OSError:
        pass
"""
NOISES = {
    "burns CPU": "for n in $(seq 16); do while :; do :; done & done; wait",
    "takes all memory": f"exec python3 -c '{_MEMORY}'",
    "forks without end": "f() { f | f & }; while :; do f; done 2>/dev/null",
    "prints 10 GB": "while :; do yes 'ten gigabytes of this' | head -c 10G; done",
    "opens every descriptor": f"exec python3 -c '{_DESCRIPTORS.format(processes=1)}'",
    "200 open every descriptor": f"exec python3 -c '{_DESCRIPTORS.format(processes=200)}'",
    "floods the resolver": f"exec python3 -c '{_QUESTIONS}'",
    "never reads its stdin": "exec sleep infinity",
}
DISK_NOISES = {
    "fills its disk": "while :; do dd if=/dev/zero bs=1M >>/tmp/zeros; echo more >>/tmp/more; done 2>/dev/null",
    "writes all the time": "while :; do dd if=/dev/zero of=/tmp/zeros bs=1M count=1000; done 2>/dev/null",
    "makes files without end": f"exec python3 -c '{_MANY_FILES}'",
    "syncs without end": f"exec python3 -c '{_SYNCS}'",
    "punches holes": f"exec python3 -c '{_HOLES}'",
    "deletes without end": "while :; do head -c 200M /dev/zero >/tmp/zeros; sync /tmp/zeros; rm /tmp/zeros; done",
    "calls sync, eight at once": "for n in $(seq 8); do while :; do sync; done & done; wait",
    "calls syncfs, eight at once": f"exec python3 -c '{_SYNCFS}'",
    "takes snapshots": "while :; do head -c 100k /dev/urandom >/tmp/$((n = (n + 1) % 100)); done",
}
"""What wears disks. While a devbox changes its files as the last one does, snapshots of it are taken by the API."""
_SNAPSHOTS_AT_ONCE = 10


@contextlib.contextmanager
def noise(api: Api, kind: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A devbox that makes this noise while the block lasts, or until what comes with its id is called.

    At the end all of it is gone.
    """
    box = api.create(name=kind, launch_parameters=_SIZE)
    with contextlib.ExitStack() as ending:
        ending.callback(_end, api, box)
        execution = api.start(box, f"echo {_BEGUN} | tee /tmp/begun; {(NOISES | DISK_NOISES)[kind]}", attach_stdin=True)
        with api.stream(box, execution) as events:
            assert _BEGUN in next(event.output for event in events if event.output)
        if kind == "never reads its stdin":
            while api.send(box, execution, "x" * (1 << 20)):
                pass
        if kind == "fills its disk":
            _until_full(api, box)
        snapshots = ending.enter_context(contextlib.ExitStack())
        if kind == "takes snapshots":
            snapshots.enter_context(_snapshots(api, box))

        def stop() -> None:
            snapshots.close()
            api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
            api.wait(box, execution)

        yield box, stop


def _end(api: Api, box: str) -> None:
    api.shutdown(box)
    for _ in range(600):
        if not groups(f"*/boxes/{box}"):
            return
        time.sleep(0.1)  # the kernel tells nobody when the last process of a group has gone
    raise AssertionError(f"{box} is still there")


def _until_full(api: Api, box: str) -> None:
    for _ in range(600):
        if api.run(box, "echo full >/tmp/probe && sync /tmp/probe && head -c 1M /dev/zero >/tmp/probe")["exit_status"]:
            return
        time.sleep(0.1)  # nobody is told when a disk is full
    raise AssertionError(f"{box} does not fill its disk")


@contextlib.contextmanager
def _snapshots(api: Api, box: str) -> Iterator[None]:
    """Snapshots are taken and deleted as fast as can be while the block lasts, some kept at any time."""
    begun, over = threading.Event(), threading.Event()

    def work() -> None:
        kept: list[str] = []
        with Api(str(api.http.base_url), api.http.headers["authorization"].removeprefix("Bearer ")) as own:
            while not over.is_set():
                kept.append(own.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"])
                if len(kept) > _SNAPSHOTS_AT_ONCE:
                    begun.set()
                    own.call("POST", f"/v1/devboxes/disk_snapshots/{kept.pop(0)}/delete")
            for snapshot in kept:
                own.call("POST", f"/v1/devboxes/disk_snapshots/{snapshot}/delete")

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        working.add_done_callback(lambda _: begun.set())
        begun.wait()
        try:
            yield
        finally:
            over.set()
        working.result()


@dataclass(frozen=True)
class Figures:
    """What `measure` found: seconds of each `execute` in the quiet and in the noisy phases, and bytes of the server."""

    quiet: list[float]
    noisy: list[float]
    level: int
    most: int
    others: float
    """Processors that everything else on the machine took in the noisy phases: neither server, nor boxes, nor asker."""

    @property
    def ratio(self) -> float:
        """The p95 of the noisy phases, of the quiet ones being 1."""
        return p95(self.noisy) / p95(self.quiet)


def measure(
    server: Server, api: Api, neighbour: str, kind: str, *, rounds: int, seconds: float, work: str = ""
) -> Figures:
    """Quiet and noisy phases by turns, of so many seconds each. Every command, after this work, must succeed."""
    quiet: list[float] = []
    noisy: list[float] = []
    ask(api, neighbour, seconds, work)
    level = most = memory(server)
    others = lasted = 0.0
    for _ in range(rounds):
        quiet += ask(api, neighbour, seconds, work)
        with noise(api, kind):
            began, before = time.monotonic(), _others(server)
            for _ in range(4):
                noisy += ask(api, neighbour, seconds / 4, work)
                most = max(most, memory(server))
            others, lasted = others + _others(server) - before, lasted + time.monotonic() - began
    return Figures(quiet, noisy, level, most, others / lasted)


def _others(server: Server) -> float:
    """Processor time, in seconds, that everything but the server, its boxes and this process has had so far."""
    claim = claim_of(server.state)
    assert claim is not None, "the server has no claim"
    busy = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    own = Path(f"/proc/{server.pid}/stat").read_text().rpartition(") ")[2].split()
    ticks = sum(busy) - busy[3] - busy[4] - int(own[11]) - int(own[12])
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time() - cgroups.find(claim.name).cpu_seconds()


def ask(api: Api, box: str, seconds: float, work: str = "") -> list[float]:
    """Run one command after the other for a while, at least ten; the seconds that each took."""
    took: list[float] = []
    end = time.monotonic() + seconds
    while (begun := time.monotonic()) < end or len(took) < 10:
        command_id = f"c{time.monotonic_ns()}"
        body = {"command": f"{work}echo {command_id}", "command_id": command_id}
        view = api.call("POST", f"/v1/devboxes/{box}/execute", body)
        if view["status"] != "completed":
            view = api.wait(box, view["execution_id"])
        took.append(time.monotonic() - begun)
        assert (view["status"], view["exit_status"], view["stdout"]) == ("completed", 0, f"{command_id}\n"), view
    return took


WRITE = "set -e; head -c 65536 /dev/zero >/tmp/kept; sync /tmp/kept; "
"""A file that is small and shall be on the disk: what a neighbour's `ask` may do before each answer."""


def p95(values: list[float]) -> float:
    """What 95 of 100 values do not exceed."""
    return sorted(values)[int(len(values) * 0.95)]


def memory(server: Server) -> int:
    """Bytes of memory that the server holds and nobody else does."""
    rows = Path(f"/proc/{server.pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith("Private_"))
