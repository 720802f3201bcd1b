"""lxcfs: boxes see their own figures in /proc; the daemon outlives the server, and its death breaks nothing."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from pathlib import Path

import pytest

from devboxd.engine import linux, lxcfs
from devboxd.engine.base import Image, Resources
from devboxd.engine.cgroups import ROOT
from support.engine import Box, Host
from support.leftovers import groups

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.box,
    pytest.mark.skipif(lxcfs.lack() is not None, reason="lxcfs is not installed here, or there is no FUSE"),
]
SIZE = Resources(0.5, 512 << 20, 256)
FIGURES = r"""
awk '/^MemTotal/ {print $2}' /proc/meminfo
free -b | awk '/^Mem/ {print $2}'
grep -c ^processor /proc/cpuinfo
grep -c ^cpu[0-9] /proc/stat
awk '{print ($1 < 300)}' /proc/uptime
"""
_COUNTED = os.cpu_count() if (ROOT / "cgroup.controllers").exists() else 1
"""What a processor did is counted by cgroup in version 1 alone; else lxcfs passes on what the machine's did."""
OWN = f"{SIZE.memory_bytes >> 10}\n{SIZE.memory_bytes}\n1\n{_COUNTED}\n1"


def daemon(host: Host) -> int:
    """The process, which must be one."""
    (pids,) = {path.read_text() for path in groups(f"{host.instance.id}/boxes/.lxcfs/cgroup.procs")}
    (pid,) = map(int, pids.split())
    return pid


async def figures(box: Box, expected: str) -> None:
    """Wait until the box sees these."""
    async with asyncio.timeout(60):
        while (seen := (await box.run("bash", "-c", FIGURES)).out.strip()) != expected:
            await asyncio.sleep(0.1)  # nobody is told
            print(seen)


async def test_a_box_sees_its_own_figures(host: Host) -> None:
    box, larger = await host.box(SIZE), await host.box(Resources(1, 1 << 30, 256))
    assert await box.sh(FIGURES) == OWN
    assert await box.sh(FIGURES, user="user") == OWN
    assert (await larger.sh(FIGURES)).split()[:3] == [str(1 << 20), str(1 << 30), "1"]
    assert float((await box.sh("cat /proc/loadavg")).split()[0]) < 1
    assert (await box.run("bash", "-c", "echo x >/proc/meminfo")).status != 0
    assert "rw" not in (await box.sh("findmnt -no OPTIONS /proc/meminfo")).split(",")


async def test_the_daemon_outlives_the_server_and_goes_with_the_last_box(image: Image, tmp_path: Path) -> None:
    host = Host(image, tmp_path / "state")
    await host.open()
    box = await host.box(SIZE)
    pid = daemon(host)
    await host.close()
    assert linux.start_time(pid) is not None
    await host.open()
    assert daemon(host) == pid
    assert await box.sh(FIGURES) == OWN
    await host.destroy_all()
    await host.close()
    assert linux.start_time(pid) is None
    assert str(host.instance.directory) not in " ".join(linux.mount_points())
    assert not host.instance.directory.exists()


@pytest.mark.parametrize("open_then", [True, False], ids=["with the server", "while there is no server"])
async def test_its_death_breaks_nothing(image: Image, tmp_path: Path, open_then: bool) -> None:
    async with Host(image, tmp_path / "state") as host:
        box = await host.box(SIZE)
        pid = daemon(host)
        if not open_then:
            await host.close()
        os.kill(pid, signal.SIGKILL)
        if not open_then:
            await host.open()
        await figures(box, OWN)
        assert daemon(host) != pid
        assert await (await host.box(SIZE)).sh(FIGURES) == OWN


async def test_a_box_of_a_server_without_it_gets_its_files_later(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Host(image, tmp_path / "state") as host:
        await host.close()
        with monkeypatch.context() as without:
            without.setattr(lxcfs, "which", lambda name: None)
            await host.open()
            box = await host.box(SIZE)
            assert (await box.sh(FIGURES)).split()[0] != str(SIZE.memory_bytes >> 10)
            await host.close()
        await host.open()
        assert await box.sh(FIGURES) == OWN


async def test_one_that_does_not_start_is_no_obstacle(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "bin" / "lxcfs"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(os, "defpath", str(program.parent) + ":" + os.defpath)
    async with Host(image, tmp_path / "state") as host:
        assert await (await host.box(SIZE)).sh("free >/dev/null; cat /proc/uptime | wc -l") == "1"


async def test_what_boxes_make_it_do_has_limits(host: Host) -> None:
    box, other = await host.box(SIZE), await host.box(SIZE)
    reading = asyncio.ensure_future(
        box.run(
            "timeout", "5", "bash", "-c", "for n in {1..20}; do (while :; do read x </proc/stat; done) & done; wait"
        )
    )
    assert await other.sh(FIGURES) == OWN
    await reading
    limits = {
        path.name: path.read_text().split()[0]
        for path in groups(f"{host.instance.id}/boxes/.lxcfs/*")
        if path.name in ("memory.limit_in_bytes", "memory.max", "cpu.cfs_quota_us", "cpu.max")
    }
    assert set(limits.values()) == {str(256 << 20), "100000"}
    assert shutil.which("lxcfs")
