"""Questions to this machine, answered by trying; none changes anything that stays.

Those that return `str | None` return the problem, or None when all is well.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from devboxd.engine import linux, rootfs
from devboxd.engine.instance import IDS_PER_BOX, Instance
from devboxd.engine.processes import which
from devboxd.engine.wall import ruleset
from devboxd.path_errors import reason

_SECONDS = 30
_SAMPLE = 200
_FIRST_ID = 1 << 29
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS, _FS_APPEND_FL = 0x80086601, 0x40086602, 0x20


def version_of(tool: str) -> str | None:
    """The first line that `tool --version` says, or None when it does not run."""
    path = which(tool)
    if path is None:
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_SECONDS, check=True)
        return done.stdout.splitlines()[0].strip() if done.stdout else path
    return None


def existing(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists, as far as this user may look."""
    path = path.absolute()
    while not os.path.isdir(path):  # Path.is_dir raises where the user may not search
        path = path.parent
    return path.resolve()


def file_system(path: Path) -> tuple[str, str]:
    """The kind of file system that a folder is or will be on, and where that is mounted."""
    place = str(existing(path))
    best = ("unknown", "/")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        inside = point == "/" or place == point or place.startswith(point + "/")
        if inside and len(point) >= len(best[1]):
            best = (after.split()[0], point)
    return best


def processes_hidden() -> bool:
    """Whether users see their own processes alone in /proc."""
    for line in _text(Path("/proc/self/mountinfo")).splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == "/proc":
            options = after.split()[2].split(",")
            return any(
                f"hidepid={value}" in options for value in ("1", "2", "4", "noaccess", "invisible", "ptraceable")
            )
    return False


def namespace(kind: str) -> bool:
    """Whether the kernel has namespaces of this kind."""
    return Path(f"/proc/self/ns/{kind}").exists()


def sysctl_is_zero(kind: str) -> bool:
    """Whether an administrator has switched namespaces of this kind off."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/sys/user/max_{kind}_namespaces").read_text().strip() == "0"
    return False


def namespaces() -> str | None:
    """Make all that a box needs."""
    kinds = ("--user", "--net", "--cgroup", "--ipc", "--uts", "--mount", "--pid", "--fork")
    return _problem(["unshare", *kinds, "true"], "")


def wall() -> str | None:
    """Load the rules of the boxes' network into an empty network namespace."""
    network = ipaddress.IPv4Network("198.18.0.0/22")
    rules = ruleset(Instance("x", Path("/"), Path("/"), network, _FIRST_ID, slots=2), [], [(network[9], 80)])
    return _problem(["unshare", "--net", which("nft") or "nft", "-f", "-"], rules)


def box_root(cache: Path, state: Path) -> str | None:
    """Mount the root of a box as the engine does: a shared layer from the cache, a disk in the state folder."""
    try:
        with contextlib.ExitStack() as stack:
            layer = stack.enter_context(tempfile.TemporaryDirectory(prefix=".devboxd-", dir=existing(cache)))
            disk = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".devboxd-", dir=existing(state))))
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="devboxd-")))
            (disk / "upper").mkdir()
            (disk / "work").mkdir()
            descriptor = stack.enter_context(_user_namespace())
            thread = stack.enter_context(ThreadPoolExecutor(max_workers=1))
            thread.submit(_mount_and_write, Path(layer), disk, place, descriptor).result()
    except (OSError, subprocess.SubprocessError) as error:
        return reason(error)
    return None


def append_only(folder: Path) -> bool:
    """Whether files of the folder can be marked append-only."""
    buffer = bytearray(8)
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=existing(folder)) as file:
        fcntl.ioctl(file, _FS_IOC_GETFLAGS, buffer)
        flags = int.from_bytes(buffer, "little")
        fcntl.ioctl(file, _FS_IOC_SETFLAGS, (flags | _FS_APPEND_FL).to_bytes(8, "little"))
        fcntl.ioctl(file, _FS_IOC_SETFLAGS, flags.to_bytes(8, "little"))
        return True
    return False


def copying(folder: Path) -> float | None:
    """About how many seconds it takes to copy 10,000 files of 10 KB there, from a sample of 200 of them."""
    with contextlib.suppress(OSError), tempfile.TemporaryDirectory(prefix=".devboxd-", dir=existing(folder)) as name:
        source = Path(name, "source")
        source.mkdir()
        for number in range(_SAMPLE):
            (source / str(number)).write_bytes(bytes(10_000))
        begun = time.perf_counter()
        shutil.copytree(source, Path(name, "copy"))
        return (time.perf_counter() - begun) * 10_000 / _SAMPLE
    return None


def firewalls() -> dict[str, bool]:
    """Which programs known to filter forwarded packets are in use."""
    return {
        "Docker": Path("/var/run/docker.sock").exists() or Path("/sys/class/net/docker0").exists(),
        "ufw": "ENABLED=yes" in _text(Path("/etc/ufw/ufw.conf")),
        "firewalld": Path("/run/firewalld").exists() or Path("/var/run/firewalld.pid").exists(),
    }


def forward_blockers() -> list[str]:
    """Chains of other programs that drop forwarded packets unless a rule of theirs accepts them. Needs root."""
    found = []
    for item in _nft_objects("chains"):
        chain = item.get("chain", {})
        if chain.get("hook") == "forward" and chain.get("policy") == "drop":
            found.append(f"nftables {chain['family']} {chain['table']} {chain['name']}")
    if any(item.get("table", {}).get("name") == "firewalld" for item in _nft_objects("tables")):
        found.append("nftables inet firewalld")
    if "filter" in _text(Path("/proc/net/ip_tables_names")).split():
        legacy = which("iptables-legacy") or which("iptables")
        if legacy and "-P FORWARD DROP" in _output([legacy, "-S", "FORWARD"]):
            found.append("iptables FORWARD")
    return found


def selinux_enforces() -> bool:
    """Whether SELinux is there and enforces its policy."""
    return _text(Path("/sys/fs/selinux/enforce")).strip() == "1"


@contextlib.contextmanager
def _user_namespace() -> Iterator[int]:
    """A user namespace with ids as boxes have them; the echo of its one process shows that it exists."""
    command = ["unshare", "--user", "cat"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as helper:
        assert helper.stdin is not None and helper.stdout is not None  # noqa: PT018
        helper.stdin.write(b"x")
        if not helper.stdout.read(1):
            raise OSError("user namespaces cannot be made")
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{helper.pid}/{name}").write_text(f"0 {_FIRST_ID} {IDS_PER_BOX}\n")
        descriptor = os.open(f"/proc/{helper.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _mount_and_write(layer: Path, disk: Path, place: Path, user_namespace: int) -> None:
    """Runs in a thread that ends with it, and with it the mounts."""
    linux.private_mounts()
    tree = linux.clone(disk)
    try:
        root = rootfs.assemble(place, [layer], tree, user_namespace, _FIRST_ID)
    finally:
        os.close(tree)
    with linux.file_system_ids(_FIRST_ID):
        (root / "written").touch()


def _problem(command: list[str], text: str) -> str | None:
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return reason(error)
    said = done.stderr.strip().splitlines()
    return None if done.returncode == 0 else (said[0] if said else f"status {done.returncode}")


def _output(command: list[str]) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        return done.stdout
    return ""


def _nft_objects(kind: str) -> list[dict[str, dict[str, str]]]:
    try:
        found = json.loads(_output([which("nft") or "nft", "-j", "list", kind]))["nftables"]
    except (ValueError, KeyError):
        return []
    return [item for item in found if isinstance(item, dict)]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
