"""What a server left on the machine after it ended and its boxes were shut down. Looks at its own things only."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from support.disks import volumes_of

RUN = Path("/run/devboxd")
CGROUPS = Path("/sys/fs/cgroup")


def groups(pattern: str) -> list[Path]:
    """What is below the folder of an instance in each hierarchy; `**` would stumble over those that others remove."""
    return [path for prefix in ("", "*/") for path in CGROUPS.glob(f"{prefix}devboxd-{pattern}")]


def leftovers(state: Path) -> list[str]:
    """Mounts, processes, namespaces, links and cgroups of the server with this state folder, in words."""
    claim = claim_of(state)
    marks = [str(state)] + ([f"{claim}/"] if claim else [])
    found = [f"mount {point}" for point in _mounts() if any(mark in point for mark in marks)]
    found += volumes_of(state)
    found += [f"process {pid}: {text}" for pid, text in _processes() if any(mark in text for mark in marks)]
    if claim:
        found += [f"{kind} {name}" for kind, name in _named(claim.name)]
    return found


def remove_all(state: Path) -> None:
    """Take away all that a dead server and its dead boxes left, as a restart of the machine does."""
    while volumes_of(state):  # what the dead had written goes to the disk first
        time.sleep(0.01)
    for point in [point for point in _mounts() if str(state) in point]:
        subprocess.run(["umount", point], check=True)
    if (claim := claim_of(state)) is None:
        return
    for kind, name in _named(claim.name):
        if kind == "link":
            subprocess.run(["ip", "link", "delete", name], check=False)  # it may go with its namespace meanwhile
        if kind == "table":
            subprocess.run(["nft", "delete", *name.split()], check=True)
    subnet = json.loads((claim / "claim").read_text())["subnet"]
    for words in (f"route delete {subnet} dev lo", f"rule delete to {subnet}"):
        subprocess.run(["ip", *words.split()], check=True)
    for members in groups(f"{claim.name}/boxes/.lxcfs/cgroup.procs"):
        for pid in members.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    subprocess.run(["umount", "--lazy", "--quiet", claim / "lxcfs"], check=False)
    for group in sorted(groups(f"{claim.name}/**/"), reverse=True):
        while group.exists():  # the kernel lets go of the dead a moment later
            with contextlib.suppress(OSError):
                group.rmdir()
    shutil.rmtree(claim)


def claim_of(state: Path) -> Path | None:
    """The folder with the server's share of the machine."""
    for path in RUN.glob("*/claim"):
        with contextlib.suppress(FileNotFoundError):  # that of another server, which ends at this moment
            if json.loads(path.read_text()).get("state") == str(state.resolve()):
                return path.parent
    return None


def descriptors(pid: int | str) -> dict[str, str]:
    """What a process has open: number to target. One that is closed while we look is not open."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found[path.name] = os.readlink(path)
    return found


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        yield line.split()[4]


def _processes() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            try:
                words = Path("/proc", name, "cmdline").read_bytes().split(b"\0")
                yield int(name), b" ".join(words).decode("utf-8", "replace")
            except OSError:
                continue


def _named(instance: str) -> Iterator[tuple[str, str]]:
    """Cgroups of boxes, links, tables and rules whose names carry the id of the instance.

    The server cannot remove the cgroup in which it ended itself; an empty one costs nothing and is used again.
    """
    for folder, names, _ in os.walk(CGROUPS):
        if f"devboxd-{instance}/boxes" in folder:
            yield from (("cgroup", f"{folder}/{name}") for name in names)
    links = re.compile(rf"dbx{instance}[0-9]+")
    yield from (("link", name) for name in os.listdir("/sys/class/net") if links.fullmatch(name))
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, timeout=30, check=False)
    yield from (("table", line) for line in tables.stdout.splitlines() if line.endswith(f" devboxd_{instance}"))
    rules = subprocess.run(["ip", "rule", "list"], capture_output=True, text=True, timeout=30, check=False)
    routes = f"lookup {0xDB00 + ord(instance)}"
    yield from (("rule", line) for line in rules.stdout.splitlines() if line.endswith(routes))
