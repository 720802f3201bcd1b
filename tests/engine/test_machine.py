"""What a box sees of its machine: its own limits where programs look for them, and nothing of the host or of others."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from devboxd.engine import cgroups
from devboxd.engine.base import Resources
from devboxd.engine.machine import processors
from support.engine import Box, Host

pytestmark = [pytest.mark.anyio, pytest.mark.box]

FIND_LIMITS = """
import json
paths = {}
for line in open("/proc/self/cgroup"):
    number, names, path = line.strip().split(":", 2)
    paths.update({name: path for name in names.split(",")})
mounts = {}
for line in open("/proc/self/mountinfo"):
    words = line.split()
    kind, _, options = words[words.index("-") + 1:]
    if kind.startswith("cgroup"):
        assert words[3] == "/", line
        names = options.split(",") if kind == "cgroup" else ("memory", "cpu", "cpuset")
        mounts.update({name: (kind, words[4]) for name in names})
assert "cpuset" in mounts, "the JVM trusts no version 1 without it"
def read(name, first, second):
    kind, mount = mounts[name]
    file = first if kind == "cgroup" else second
    return open(f"{mount}{paths.get(name, '/')}/{file}").read().split()
memory = int(read("memory", "memory.limit_in_bytes", "memory.max")[0])
quota = read("cpu", "cpu.cfs_quota_us", "cpu.max") + read("cpu", "cpu.cfs_period_us", "cpu.max")
print(json.dumps({"memory": memory, "cpu": int(quota[0]) / int(quota[-1])}))
"""
HIDDEN = (
    "/proc/cmdline", "/proc/diskstats", "/proc/fs", "/proc/locks", "/proc/partitions", "/proc/swaps", "/sys/block",
    "/sys/class/block", "/sys/dev/block", "/sys/devices/virtual/block", "/sys/devices/virtual/bdi", "/sys/fs/btrfs",
    "/sys/fs/ext4", "/sys/firmware", "/sys/fs/cgroup/unified", "/sys/class/bdi", "/sys/class/dmi", "/sys/bus",
)  # fmt: skip
OWN = (
    "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/proc/locks", "/sys",
    "/sys/devices/system/cpu", "/sys/devices/system/cpu/online", "/sys/class/net", "/sys/block", "/run/devboxd/init",
    "/usr/bin/bash", "/proc/version",
)  # fmt: skip
LOCK = """
import fcntl, os, sys, time
for name in sys.argv[1:]:
    fcntl.flock(os.open(name, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
open("/tmp/locked", "w").close()
"""


async def test_the_box_finds_its_limits_where_runtimes_of_languages_look(host: Host) -> None:
    """As the JVM, .NET, Go, Rust and libuv do: by the mounts of cgroups, and below them the path of the process."""
    box = await host.box(Resources(0.5, 768 << 20, 256))
    assert json.loads((await box.run("python3", "-c", FIND_LIMITS)).out) == {"memory": 768 << 20, "cpu": 0.5}
    version = "cgroup2fs" if (cgroups.ROOT / "cgroup.controllers").exists() else "tmpfs"
    assert await box.sh("stat -f -c %T /sys/fs/cgroup") == version, ".NET tells the versions apart by this"
    assert await box.sh("getconf _NPROCESSORS_ONLN; python3 -c 'import os; print(os.cpu_count())'") == "1\n1"
    node = "console.log(require('os').availableParallelism(), process.constrainedMemory?.())"
    assert (await box.run("node", "-e", node)).out.split()[1] == str(768 << 20)


async def test_of_cgroups_the_box_sees_its_own_alone_and_changes_none(host: Host) -> None:
    box, other = await host.box(), await host.box()
    found = (await box.sh("find /sys/fs/cgroup -type d -exec stat -c '%d:%i' {} +")).split()
    assert not set(found) & set((await other.sh("find /sys/fs/cgroup -type d -exec stat -c '%d:%i' {} +")).split()[1:])
    script = """
find /sys/fs/cgroup -type f | while read -r file; do
    if (: >>"$file") 2>/dev/null; then echo "$file"; fi
done
find /sys/fs/cgroup -type d | while read -r folder; do mkdir "$folder/own" 2>/dev/null && echo "$folder"; done
grep -l . $(find /sys/fs/cgroup -name cgroup.procs) | wc -l
"""
    assert int(await box.sh(script)) >= 1


async def test_nothing_names_disks_boxes_or_places_of_the_host(shared: Box) -> None:
    """Every file below /proc and /sys that root, or a plain user, can read."""
    disks = [re.escape(path.name) for path in Path("/sys/block").iterdir()]  # noqa: ASYNC240
    words = [rf"(^|[^A-Za-z0-9])({'|'.join(disks)})($|[^A-Za-z0-9])", "devboxd-[0-9a-z]+/", "dbx_[0-9A-Za-z]{8}"]
    script = f"""
find /proc /sys -type f -readable \\( -path '/proc/self/*' -o -not -path '/proc/[0-9]*' \\) \\
    -not -name 'kmsg' -not -name 'page*' -not -path '/proc/self/task/*' -not -name mem 2>/dev/null |
    timeout 100 xargs -d '\\n' grep -sHaoE -m3 -e {shlex.quote("|".join(words))} -- | grep -av /cmdline: || true
"""
    for user in ("root", "user"):
        assert await shared.sh(script, user=user) == "", user
    for path in HIDDEN:
        assert await shared.sh(f"test -d {path} && ls -A {path} || cat {path} 2>/dev/null || true") == "", path


async def test_df_and_the_list_of_mounts_show_what_is_the_boxs_own(shared: Box) -> None:
    lines = (await shared.sh("df --output=fstype,source,target")).splitlines()[1:]
    assert {line.split()[0] for line in lines} == {"overlay", "tmpfs"}
    mounts = await shared.sh("cat /proc/self/mountinfo")
    assert str(shared.state) not in mounts
    kinds = {line.split(" - ")[1].split()[0] for line in mounts.splitlines()}
    assert kinds <= {"overlay", "tmpfs", "proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "fuse.lxcfs"}
    memory = await shared.sh("df --output=size,target /dev/shm /run | tail -n +2")
    assert memory.split() == [str(256 << 10), "/dev/shm", str(64 << 10), "/run"], (
        "parts of the box's, not of the host's"
    )


async def test_no_inode_is_shared_with_the_host_or_another_box(host: Host) -> None:
    """A lock on a shared inode is seen by the other one, and so is each use of it."""
    boxes = [await host.box(), await host.box()]
    seen = [(await box.sh(f"stat -L -c '%d:%i' {' '.join(OWN)}")).split() for box in boxes]
    hosts = [os.stat(name) for name in OWN if os.path.exists(name)]  # noqa: ASYNC240
    assert not {*seen[0]} & {*seen[1]}
    assert not {*seen[0], *seen[1]} & {f"{found.st_dev}:{found.st_ino}" for found in hosts}
    names = [name for name in OWN if name not in ("/dev/tty", "/proc/locks")]  # wants a terminal; is /dev/null
    holding = asyncio.ensure_future(boxes[0].run("python3", "-c", LOCK + "time.sleep(30)", *names))
    await boxes[0].sh("until test -e /tmp/locked; do sleep 0.01; done")
    assert (await boxes[1].run("python3", "-c", LOCK, *names)).err == ""
    for name in ("/dev/null", "/dev/zero", "/dev/urandom"):
        descriptor = os.open(name, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(descriptor)
    await boxes[0].run("pkill", "python3")
    await holding


@pytest.mark.parametrize(("cores", "number"), [(0.5, 1), (1, 1), (1.5, 2), (2, 2), (4, 4), (8, 4)])
def test_a_part_of_a_processor_counts_as_one(cores: float, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert processors(cores) == number
