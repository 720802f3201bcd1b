"""The config.json of a box. Nothing in it is secret: any process of the host's root and the runtime's state show it."""

from __future__ import annotations

import base64
import hashlib
import os
import resource
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from devboxd.engine import linux, seccomp
from devboxd.engine.base import BoxSpec, Resources
from devboxd.engine.instance import IDS_PER_BOX

AGENT = "/run/devboxd/init"
CAPABILITIES = [
    f"CAP_{name}"
    for name in (
        "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP",
        "SETUID", "SYS_CHROOT",
    )
]  # fmt: skip
MASKED = (
    "/proc/acpi", "/proc/asound", "/proc/cmdline", "/proc/diskstats", "/proc/driver", "/proc/fs", "/proc/interrupts",
    "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/locks", "/proc/mdstat", "/proc/partitions",
    "/proc/pressure", "/proc/sched_debug", "/proc/scsi", "/proc/swaps", "/proc/timer_list", "/proc/timer_stats",
)  # fmt: skip
READ_ONLY = ("/proc/bus", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_MIB = 1 << 20
_TERMINALS = "max=256"
"""The kernel has 3072 (`kernel.pty.max`) for all boxes."""
_UNLIMITED = resource.RLIM_INFINITY
_AGENTS_OWN = 24
"""So many processes fewer than the pids cgroup allows may each user of a box have: there the kernel looks after it has
copied all that a fork copies, locks of files shared with other boxes included; at a user's limit before."""
_LIMITS = {
    "AS": (_UNLIMITED, _UNLIMITED),
    "CORE": (1, 1),  # the one value with which the kernel starts no core handler of the host
    "CPU": (_UNLIMITED, _UNLIMITED),
    "DATA": (_UNLIMITED, _UNLIMITED),
    "FSIZE": (_UNLIMITED, _UNLIMITED),
    "MEMLOCK": (8 * _MIB, 8 * _MIB),
    "MSGQUEUE": (819200, 819200),
    "NICE": (0, 0),
    "NOFILE": (65536, 1048576),
    "RSS": (_UNLIMITED, _UNLIMITED),
    "RTPRIO": (0, 0),
    "SIGPENDING": (65536, 65536),
    "STACK": (8 * _MIB, _UNLIMITED),
}


class Seccomp:
    """The system call filter in the form that the runtime takes; compiled once, here, for crun."""

    def __init__(self, nested_user_namespaces: bool, *, compiled: bool) -> None:
        """Raises SetupError when libseccomp is missing."""
        table = seccomp.rules(nested_user_namespaces)
        self.linux: dict[str, Any] = {} if compiled else {"seccomp": seccomp.oci(table)}
        program = base64.b64encode(seccomp.compile_filter(table)).decode() if compiled else ""
        self.annotations = {"run.oci.seccomp_bpf_data": program} if compiled else {}


def config(
    spec: BoxSpec,
    place: Path,
    system: Mapping[str, Path],
    namespaces: Sequence[dict[str, str]],
    calls: Seccomp,
) -> dict[str, Any]:
    """The whole config.json but for what only one runtime wants.

    `place` is where the box's mounts are at the start, `system` what is bound into it besides, by its place there.
    Without HOME the runtime looks into the box's own /etc/passwd, whatever that is.
    """
    return {
        "ociVersion": "1.0.2",
        "hostname": spec.hostname,
        "root": {"path": str(place / "root")},
        "annotations": calls.annotations,
        "mounts": _mounts(spec, place, system),
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0, "umask": 0o022},
            "args": [AGENT],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"],
            "cwd": "/",
            "capabilities": {kind: CAPABILITIES for kind in ("bounding", "effective", "permitted")},
            "rlimits": rlimits(spec.resources),
            "noNewPrivileges": False,
            "oomScoreAdj": max(0, linux.oom_adjustment()),  # less than this the machine does not permit
        },
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "cgroup")] + list(namespaces),
            "maskedPaths": list(MASKED),
            "readonlyPaths": list(READ_ONLY),
            **calls.linux,
        },
    }


def mappings(first_uid: int) -> dict[str, Any]:
    """The maps of a box's user namespace, for runtimes that cannot read them off the namespace."""
    rows = [{"containerID": 0, "hostID": first_uid, "size": IDS_PER_BOX}]
    return {"uidMappings": rows, "gidMappings": rows}


def rlimits(resources: Resources) -> list[dict[str, Any]]:
    """Every limit, so that none comes from whoever started the server; none above what this host allows."""
    rows = []
    processes = max(1, resources.pids - _AGENTS_OWN)
    for name, (soft, hard) in {**_LIMITS, "NPROC": (processes, processes)}.items():
        allowed = resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1]
        least = [value for value in (hard, allowed) if value != _UNLIMITED]
        hard = min(least) if least else _UNLIMITED
        soft = hard if soft == _UNLIMITED or (hard != _UNLIMITED and hard < soft) else soft
        rows.append({"type": f"RLIMIT_{name}", "soft": _unsigned(soft), "hard": _unsigned(hard)})
    return rows


def limits_as_options(resources: Resources) -> list[str]:
    """The same as options of prlimit(1)."""
    rows = [(row["type"].removeprefix("RLIMIT_").lower(), row["soft"], row["hard"]) for row in rlimits(resources)]
    most = _unsigned(_UNLIMITED)
    return [f"--{name}={':'.join('unlimited' if n == most else str(n) for n in both)}" for name, *both in rows]


def _unsigned(value: int) -> int:
    """config.json has no negative limits: unlimited is the largest number of 64 bits."""
    return value % (1 << 64)


def _mounts(spec: BoxSpec, place: Path, system: Mapping[str, Path]) -> list[dict[str, Any]]:
    inert = ["nosuid", "nodev", "noexec"]
    shared = max(64 * _MIB, spec.resources.memory_bytes // 2)
    rows: list[tuple[str, str, list[str]]] = [
        ("/proc", "proc", inert),
        ("/dev", "tmpfs", ["nosuid", "noexec", "strictatime", "mode=755", "size=64k"]),
        ("/dev/pts", "devpts", ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5", _TERMINALS]),
        ("/dev/shm", "tmpfs", [*inert, "mode=1777", f"size={shared}"]),  # noqa: S108
        ("/dev/mqueue", "mqueue", inert),
        ("/run", "tmpfs", ["nosuid", "nodev", "mode=755", f"size={shared // 4}"]),
        ("/run/devboxd", "tmpfs", ["nosuid", "nodev", "mode=755", "size=64m"]),
    ]
    mounts: list[dict[str, Any]] = [
        {"destination": target, "type": kind, "source": kind, "options": options} for target, kind, options in rows
    ]
    lent = [(target, source, ["noexec"]) for target, source in system.items()]
    for target, source, options in (*lent, (AGENT, place / "init", [])):
        options += ["bind", "ro", "nosuid", "nodev"]
        mounts.append({"destination": target, "type": "bind", "source": str(source), "options": options})
    return mounts


def keep_agent(source: Path, folder: Path) -> Path:
    """A copy of the agent under its hash: boxes get the one that this server knows, whatever becomes of the package."""
    content = source.read_bytes()
    kept = folder / hashlib.sha256(content).hexdigest()
    if not kept.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        temporary = folder / "new"
        temporary.write_bytes(content)
        temporary.chmod(0o755)
        temporary.rename(kept)
    return kept


def hosts(hostname: str, address: str) -> str:
    """What is in /etc/hosts of a box."""
    return f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{address}\t{hostname}\n"


def listen(folder: Path) -> socket.socket:
    """The agent's listening socket at `folder`/agent.sock, a path that may be longer than a socket's address can be."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        listener.bind(f"/proc/self/fd/{descriptor}/agent.sock")
        (folder / "agent.sock").chmod(0o600)
        listener.listen(8)
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(descriptor)
    return listener


def last_words(folder: Path) -> str:
    """The last line that a runtime wrote into the log of its box."""
    try:
        lines = (folder / "runtime.log").read_text(errors="replace").strip().splitlines()
    except OSError:
        return "nothing"
    return lines[-1] if lines else "nothing"
