"""A devbox that takes all it can get disturbs no neighbour and does not swell the server. How slow it makes them is
measured by scripts/bench_neighbours.py, because a time is no matter of right and wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from devboxd.engine.base import Resources
from support.api import Api
from support.noise import DISK_NOISES, NOISES, WRITE, measure, noise
from support.reader import Reader
from support.server import Server

pytestmark = pytest.mark.box

MIB = 1 << 20
_ALL_PROCESSES = """
import os, signal
try:
    while os.fork():
        pass
except BlockingIOError:
    print("full", flush=True)
signal.pause()
"""


@pytest.fixture(scope="module")
def quiet_server() -> Iterator[Server]:
    """A server that nobody else asks, so that its memory says something; a small cap is reached by a few seconds."""
    server = Server(journal_cap_bytes=str(64 * MIB))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def asking(quiet_server: Server) -> Iterator[Api]:
    with quiet_server.api() as api:
        yield api


@pytest.fixture(scope="module")
def neighbour(asking: Api) -> str:
    return asking.create(name="neighbour")


@pytest.mark.parametrize("kind", NOISES)
def test_beside_a_noisy_devbox_commands_succeed_and_the_server_keeps_its_size(
    quiet_server: Server, asking: Api, neighbour: str, kind: str
) -> None:
    """Every command of the neighbour gives its right output, or `measure` fails."""
    figures = measure(quiet_server, asking, neighbour, kind, rounds=1, seconds=0.4)
    assert len(figures.noisy) >= 40
    assert figures.most - figures.level <= 16 * MIB


@pytest.mark.parametrize("kind", DISK_NOISES)
def test_beside_a_devbox_that_wears_disks_files_can_be_written(
    quiet_server: Server, asking: Api, neighbour: str, kind: str
) -> None:
    """Neither the limit of another's disk nor its haste reaches the neighbour, or `measure` fails."""
    figures = measure(quiet_server, asking, neighbour, kind, rounds=1, seconds=0.4, work=WRITE)
    assert len(figures.noisy) >= 40
    assert figures.most - figures.level <= 16 * MIB
    assert asking.output(neighbour, "stat -c %s /tmp/kept") == "65536\n"


@pytest.mark.parametrize("kind", DISK_NOISES)
def test_a_devbox_that_wore_its_disk_is_of_use_afterwards(asking: Api, kind: str) -> None:
    """It runs commands, its files are read and deleted, it is kept, sleeps and wakes up again."""
    with noise(asking, kind) as (box, stop):
        stop()
        assert asking.output(box, "echo runs") == "runs\n"
        assert asking.read(box, "/tmp/begun") == "the noise has begun\n"
        snapshot = asking.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
        asking.call("POST", f"/v1/devboxes/{box}/suspend")
        asking.wait_box(box, "suspended")
        asking.call("POST", f"/v1/devboxes/{box}/resume")
        asking.wait_box(box, "running")
        assert asking.output(box, "rm -r /tmp/* && echo again >/tmp/after && cat /tmp/after") == "again\n"
        asking.call("POST", f"/v1/devboxes/disk_snapshots/{snapshot}/delete")


def test_a_user_that_has_all_its_processes_keeps_the_devbox_of_use(quiet_server: Server, asking: Api) -> None:
    """Its forks fail, before the kernel has copied anything, and the agent starts the next command all the same."""
    box = asking.create(name="full")
    execution = asking.start(box, f"exec python3 -c '{_ALL_PROCESSES}'")
    Reader(quiet_server, box, execution).until(lambda r: r.text == "full\n")
    assert asking.call("GET", f"/v1/devboxes/{box}/usage")["live"]["pids"] >= Resources.pids - 24
    assert asking.output(box, "echo $((6 * 7))") == "42\n"
    assert "BlockingIOError" in asking.run(box, "exec python3 -c 'import os; os.fork()'")["stderr"]
    assert asking.read(box, "/etc/hostname").startswith("devbox-")
    asking.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {"kill_process_group": True})
    asking.wait(box, execution)
    assert asking.output(box, "true | echo after") == "after\n"
    asking.shutdown(box)
