"""What a box sees of its machine: device nodes, a small /sys, its own cgroups, the agent. None is shared with others.

All of it is made in a tmpfs of the box's own, by the starting thread, in its mount namespace. What is not named here is
not there: disks, file systems, buses and cgroups of the machine and of other boxes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from devboxd.engine import linux, netns

_NODES = {"full": (1, 7), "null": (1, 3), "random": (1, 8), "tty": (5, 0), "urandom": (1, 9), "zero": (1, 5)}
_SHOWN = ("class/net", "devices/system/cpu", "devices/virtual/net", "kernel/mm/transparent_hugepage")
"""What there is of the kernel's sysfs: libraries look for processors, links and the size of pages."""
_ONLINE = "devices/system/cpu/online"
"""By this file libraries count the processors."""
_EMPTY = ("block", "bus", "class/block", "dev/block", "fs/cgroup", "module")


def lend_devices(place: Path) -> None:
    """Let new device nodes lie over those in /dev: the runtime lends a box what it finds there.

    An inode that two boxes share is a channel between them: each sees locks and notices of the other. Raises OSError.
    """
    folder = _folder(place / "dev")
    linux.mount("tmpfs", folder, "tmpfs", linux.MS_NOSUID | linux.MS_NOEXEC, "mode=755,size=64k")
    for name, (major, minor) in _NODES.items():
        os.mknod(folder / name, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        (folder / name).chmod(0o666)
    linux.mount(str(folder), Path("/dev"), None, linux.MS_BIND)


def lend_agent(place: Path, agent: Path) -> None:
    """A copy of the agent: nothing of the machine's own disk is mounted in a box. Raises OSError."""
    copy = place / "init"
    copy.write_bytes(agent.read_bytes())
    copy.chmod(0o755)


def make_sys(place: Path, network: int, cores: float, groups: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Make what the /sys of a box consists of: where each part is, by its place in the box, outermost first.

    `network` is its network namespace, `groups` its cgroups by their places in /sys/fs/cgroup. Raises OSError.
    """
    with netns.visited(network):
        sysfs = linux.file_system("sysfs", "sysfs", ())
    try:
        linux.settle(sysfs, kernels := _folder(place / "sysfs"))
    finally:
        os.close(sysfs)
    parts = {name: kernels / name for name in _SHOWN if (kernels / name).is_dir()}
    for number, (name, group) in enumerate(groups):
        lent = parts[f"fs/cgroup/{name}".rstrip("/")] = _folder(place / f"g{number}")
        linux.mount(str(group), lent, None, linux.MS_BIND)
    tree = _folder(place / "sys")
    for name in (*_EMPTY, *parts):
        _folder(tree / name)
    if (kernels / _ONLINE).exists():
        parts[_ONLINE] = place / "online"
        last = processors(cores) - 1
        parts[_ONLINE].write_text(f"0-{last}\n" if last else "0\n")
        parts[_ONLINE].chmod(0o444)
    return {"/sys": tree, **{f"/sys/{name}": part for name, part in parts.items()}}


def processors(cores: float) -> int:
    """How many processors a box with so many cores can keep busy at once."""
    return min(os.cpu_count() or 1, max(1, -int(-cores // 1)))


def threads(cores: float) -> dict[str, str]:
    """Variables for programs that count the processors on which they may run, such as nproc and OpenMP's.

    A box may run on each of them, so that none is idle while boxes wait for another; it has a part of their time.
    """
    number = processors(cores)
    return {"OMP_NUM_THREADS": str(number)} if number < (os.cpu_count() or 1) else {}


def _folder(path: Path) -> Path:
    """Open to the box, whatever the server's umask is."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir()
        folder.chmod(0o755)
    return path
