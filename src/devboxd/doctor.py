"""`devboxd doctor`: what this machine offers, which walls are therefore up, and for each lack its cause and cure.

The same checks decide whether `serve` starts: it refuses only for those of level `error`, with the same words. Where
it can, a check does what the engine does later (mounts a box's root, loads the wall into an empty namespace) instead
of guessing from versions; that needs root, and without root the rest is still told.
"""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from devboxd import probes
from devboxd.budget import commands_within
from devboxd.config import Settings
from devboxd.devboxes.views import SIZES
from devboxd.engine import cgroups, linux, lxcfs, network, recipe, volumes, wall
from devboxd.engine.bundle import Seccomp
from devboxd.engine.images import Images
from devboxd.engine.pool import Pool, unwritable
from devboxd.engine.processes import which
from devboxd.errors import SetupError
from devboxd.http import guard

Level = Literal["ok", "warning", "error"]
_GIB = 1 << 30
_LEAST_FREE = 1 << 20
_POOLS = "198.18.0.0/15"
_SYS = Path("/proc/sys")
_VOLUMES = "install e2fsprogs, modprobe ext4 loop"
_NETWORK_FILE_SYSTEMS = frozenset(
    (
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gfs2", "ocfs2"),
        *("beegfs", "gpfs", "vboxsf", "virtiofs", "prl_fs"),
    )
)


@dataclass(frozen=True)
class Check:
    """One finding. `consequence` is the wall that stands, or what follows from the lack; `cure` is empty when ok."""

    name: str
    level: Level
    found: str
    consequence: str
    cure: str = ""

    def __str__(self) -> str:
        if self.found.startswith("cannot "):  # it is a whole sentence, with what helps
            return self.found
        return f"cannot serve: {self.name}: {self.found}; {self.consequence}. What helps: {self.cure}"


def checks(settings: Settings) -> list[Check]:
    """Everything, in the order in which a person should read it."""
    root = os.geteuid() == 0
    found = [_root(root), *_tools(settings), *_image(settings), *_settings(settings), _seccomp(settings)]
    state, space = _state(settings), _space(settings)
    found += [_cgroups(), _namespaces(root), state, *([space] if state.level != "error" else [])]
    if root and "error" not in (state.level, space.level):  # on a full disk nothing can be tried
        found += [_disks(settings), _storage(settings), _append_only(settings)]
    if root:
        found.append(_nftables())
    found += [_memory(), _open_files(), _file_table(), _inotify(), _processes()]
    found += [_terminals(), *([_filters()] if root else []), _crashes(), _process_list()]
    found += [*_neighbours(root), _figures(), _selinux(), *_names(settings), _lan(settings), _kernel(settings)]
    return found


def required(settings: Settings) -> list[Check]:
    """What `serve` cannot do without and this machine lacks; empty when it can start."""
    return [check for check in checks(settings) if check.level == "error"]


def _root(root: bool) -> Check:
    if root:
        return Check("Root", "ok", "doctor runs as root", "everything below was really tried")
    return Check(
        "Root",
        "warning",
        "doctor runs without root; disks, the append-only flag, rules of nftables and firewalls were not checked",
        "serve needs root, because only root may make the boxes' namespaces and mounts",
        "run it again with sudo",
    )


def _tools(settings: Settings) -> Iterator[Check]:
    """Programs that the engine starts."""
    version = probes.version_of(settings.runtime)
    if version is None:
        yield Check(
            "OCI runtime",
            "error",
            f"{settings.runtime} is missing",
            "nothing can start a box",
            "apt-get install crun, dnf install crun, or set runtime to crun or runc, by name or path",
        )
    else:
        yield Check("OCI runtime", "ok", version, "it does all isolation of boxes")
    for tool, package, purpose in (
        ("ip", "iproute2", "boxes get no network"),
        ("nft", "nftables", "there is no wall around the boxes' network"),
        ("unshare", "util-linux", "namespaces of boxes cannot be made"),
    ):
        if which(tool) is None:
            yield Check(tool, "error", "missing", purpose, f"install the package {package}")


def _image(settings: Settings) -> list[Check]:
    name = "Default image"
    try:
        image = Images(settings).default()
    except SetupError:
        return []  # told among the settings
    except PermissionError:
        return [Check(name, "warning", "not checked without root", "boxes start from it", "run doctor with sudo")]
    if image is not None:
        return [Check(name, "ok", f"built, {image.name}", "boxes start at once")]
    if missing := [tool for tool in ("mmdebstrap", "setpriv", "tar") if which(tool) is None]:
        cure = "apt-get install mmdebstrap debian-archive-keyring util-linux tar"
        found = f"not built, and {', '.join(missing)} is missing"
        return [Check(name, "error", found, "boxes have nothing to start from", cure)]
    consequence = "the first start of serve builds it, which takes a minute or two and needs a mirror of Debian"
    return [Check(name, "warning", "not built yet", consequence, "build it now: devboxd image build")]


def _settings(settings: Settings) -> Iterator[Check]:
    """Settings whose form only their users know."""
    wrong = [words for check in _SETTINGS if (words := _refusal(check, settings))]
    for words in wrong:
        cure = "correct it in the file of settings or the environment"
        yield Check("Settings", "error", words, "the server does not guess what was meant", cure)
    if not wrong and (extra := recipe.certificates(settings)):
        count = f"{len(extra)} extra CA certificate{'s' if len(extra) > 1 else ''}"
        yield Check("Certificates", "ok", count, "images and boxes trust them as this host does")
    for variable in recipe.refused_proxies(os.environ):
        yield Check(
            "Proxy",
            "warning",
            f"{variable} names a proxy that boxes cannot use: it carries a password, or is this machine itself",
            "it is not passed on to boxes, so tools in them go without a proxy",
            "let the proxy listen on an address beyond loopback, without a password, and list it in allow_endpoints",
        )


_SETTINGS: tuple[Callable[[Settings], object], ...] = (
    recipe.certificates,
    recipe.check_sources,
    network.servers,
    lambda settings: network.networks(settings.deny_cidrs),
    lambda settings: network.endpoints(settings.allow_endpoints),
    lambda settings: guard.host_names(settings.domains),
    lambda settings: guard.origins(settings.cors_origins),
)
"""What reads them for the server, each of which raises SetupError for what it cannot use."""


def _refusal(check: Callable[[Settings], object], settings: Settings) -> str | None:
    try:
        check(settings)
    except SetupError as error:
        return str(error)
    return None


def _seccomp(settings: Settings) -> Check:
    name = "Seccomp"
    if not Path("/proc/sys/kernel/seccomp/actions_avail").exists():
        cure = "use a kernel with CONFIG_SECCOMP_FILTER, as all distributions ship it"
        return Check(name, "error", "the kernel has no filter of system calls", "boxes reach all of the kernel", cure)
    try:
        Seccomp(settings.nested_user_namespaces, compiled="crun" in Path(settings.runtime).name)
    except SetupError as error:
        return Check(name, "error", str(error), "boxes reach all of the kernel", "apt-get install libseccomp2")
    return Check(name, "ok", "the filter compiles", "boxes reach only the system calls that programs need")


def _cgroups() -> Check:
    name = "Cgroups"
    pure = (cgroups.ROOT / "cgroup.controllers").exists()
    try:
        cgroups.find("doctor")
    except SetupError as error:
        cure = "mount cgroup2 at /sys/fs/cgroup and start the kernel without cgroup_disable"
        return Check(name, "error", str(error), "boxes could take all memory and processors", cure)
    if pure:
        return Check(name, "ok", "version 2 with cpu, memory and pids", "each box is held to its size")
    version = "version 1" + (" beside 2" if (cgroups.ROOT / "unified").exists() else "")
    return Check(
        name,
        "ok",
        f"{version} with cpu, memory and pids",
        "each box is held to its size; version 2 is better (systemd.unified_cgroup_hierarchy=1 on the kernel's command "
        "line): here what sockets keep comes on top of memory, and what the kernel writes later to disks has no pace",
    )


def _namespaces(root: bool) -> Check:
    name = "Namespaces"
    missing = [kind for kind in ("user", "net", "cgroup", "pid", "mnt", "ipc", "uts") if not probes.namespace(kind)]
    zero = [f"user.max_{kind}_namespaces" for kind in ("user", "net", "pid", "mnt") if probes.sysctl_is_zero(kind)]
    if missing:
        cure = "use a kernel of a distribution"
        return Check(name, "error", f"the kernel has none for {', '.join(missing)}", "boxes cannot be isolated", cure)
    if zero:
        cure = _set_for_good("namespaces", *(f"{key}=65536" for key in zero))
        return Check(name, "error", f"{', '.join(zero)} is 0", "boxes cannot be isolated", cure)
    if root and (problem := probes.namespaces()):
        cure = "allow them: inside a container, that one must run privileged"
        return Check(name, "error", f"cannot be made: {problem}", "boxes cannot be isolated", cure)
    return Check(name, "ok", "user, network, pid, mount and others", "root in a box is nobody on this host")


def _state(settings: Settings) -> Check:
    name = "State folder"
    kind, point = probes.file_system(settings.state)
    found = f"{settings.state} is on {kind} at {point}"
    cure = "name a folder on a local disk (ext4, xfs, btrfs) with --state or DEVBOXD_STATE"
    if kind in _NETWORK_FILE_SYSTEMS or kind.startswith("fuse"):
        return Check(name, "error", found, "locks, ids and the promise that nothing is lost do not hold there", cure)
    if not shutil.disk_usage(probes.existing(settings.state)).total:
        return Check(name, "error", found, "no files can be made there", cure)
    if kind == "overlay":
        return Check(name, "error", found, "disks of boxes cannot lie on an overlay, as inside another container", cure)
    if kind in ("tmpfs", "ramfs"):
        return Check(name, "warning", found, "boxes' disks use memory, and a reboot loses everything", cure)
    return Check(name, "ok", found, "what was confirmed survives the server")


def _space(settings: Settings) -> Check:
    place = probes.existing(settings.state)
    if why := unwritable(place):
        cure = "devboxd storage recover ends what uses it; see dmesg for the reason, check the disk and mount it again"
        return Check("Disk space", "error", why, "nothing can be stored", cure)
    free = shutil.disk_usage(place).free
    if free < _LEAST_FREE:
        return Check(
            "Disk space",
            "error",
            f"the disk of {settings.state} is full: {free >> 10} KiB are free",
            "the store cannot be written; boxes that live go on, and their commands wait where output has no room",
            "free some space, then start again",
        )
    found = f"{free / _GIB:.0f} GiB are free for {settings.state}"
    if free < 5 * _GIB:
        return Check("Disk space", "warning", found, "a few boxes fill it", "free some, or move the state folder")
    return Check("Disk space", "ok", found, "boxes and their snapshots share it")


def _storage(settings: Settings) -> Check:
    """Where disks of boxes lie, or will lie; looks for what `Pool.open` needs."""
    name = "Storage"
    disks = settings.state / "disks"
    missing = volumes.lack()
    if (settings.state / "pool.btrfs").exists() and missing:
        return Check(name, "error", missing, "disks can be neither made nor opened", _VOLUMES)
    if why := _storage_trouble(settings.state):
        cure = "restart the server, or stop it and run devboxd storage recover: boxes are suspended then"
        return Check(name, "warning", why, "boxes cannot write, and none can be made", cure)
    if (settings.state / "pool.btrfs").exists() or (
        missing is None and probes.file_system(settings.state)[0] == "btrfs"
    ):
        return Check(name, "ok", "btrfs", "each disk has a limit, and is copied in a moment while its box goes on")
    if disks.is_dir() and any(disks.iterdir()):
        lack, cure = f"disks lie in plain folders in {disks}", "end all boxes, delete all snapshots, empty the folder"
    elif which("mkfs.btrfs") is None:
        lack, cure = "mkfs.btrfs is missing", "install btrfs-progs before the first start"
    elif missing:
        lack, cure = missing, f"{_VOLUMES}, before the first start"
    elif not linux.has_file_system("btrfs"):
        lack, cure = "the kernel has no btrfs", "modprobe btrfs, before the first start"
    else:
        return Check(name, "ok", "btrfs in a file, made at the first start", "each disk has a limit; it grows with use")
    seconds = probes.copying(settings.state)
    slow = "" if seconds is None else f", here about {seconds:.1f} s for each 10,000 files"
    follows = f"disks have no limits, and a snapshot stops its box while it copies{slow}"
    return Check(name, "warning", lack, follows, cure)


def _storage_trouble(state: Path) -> str | None:
    """Why nothing can be written to a pool that is in use; None where all is well or none is."""
    pool = Pool(state)
    if os.geteuid() != 0 or not pool.folder.is_dir() or not pool.mounted:
        return None
    pool.look()
    return pool.trouble()


def _disks(settings: Settings) -> Check:
    name = "Overlay and mapped ids"
    if problem := probes.box_root(settings.cache, settings.state):
        return Check(
            name,
            "error",
            f"a box's root cannot be mounted: {problem}",
            "boxes cannot share images and have ids of their own",
            "use Linux 5.19 or newer, with state and cache on ext4, xfs or btrfs",
        )
    return Check(name, "ok", "a box's root was mounted and written", "ids of a box mean nothing on this host")


def _append_only(settings: Settings) -> Check:
    name = "Append-only files"
    if not probes.append_only(settings.state):
        return Check(
            name,
            "warning",
            "the file system of the state folder has no such flag",
            "a program in a box that gets hold of its agent could overwrite the output of its own commands",
            "keep the state folder on ext4, xfs or btrfs",
        )
    return Check(name, "ok", "the file system has the flag", "recorded output cannot be changed from inside a box")


def _nftables() -> Check:
    name = "Nftables"
    if which("nft") is None:
        return Check(name, "error", "not tried, because nft is missing", "boxes have no wall", "install nftables")
    if problem := probes.wall():
        return Check(
            name,
            "error",
            f"the kernel refuses the rules: {problem}",
            "there is no wall around the boxes' network",
            "load nf_tables, nft_fib_inet, nft_masq, nft_ct and nft_connlimit, or use a kernel of a distribution",
        )
    stands = "boxes reach neither this host, nor each other, nor metadata services"
    return Check(name, "ok", "the kernel takes the rules", stands)


def _memory() -> Check:
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB
    cores = os.cpu_count() or 1
    found = f"{gib:.0f} GiB of memory, {cores} processors"
    larger = [size for size, (cpu, memory, _) in SIZES.items() if memory > gib or cpu > cores]
    if larger:
        return Check(
            "Memory",
            "warning",
            found,
            f"{', '.join(larger)} {'promises' if len(larger) == 1 else 'promise'} more than there is; sizes are "
            "limits, not reservations, and when memory ends the kernel ends commands in boxes first",
            "ask for smaller sizes, or use a larger machine",
        )
    return Check("Memory", "ok", found, "every size fits; sizes are limits, not reservations")


def _open_files() -> Check:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    at_once = commands_within(hard)
    found = f"at most {hard}, for about {at_once} commands at once"
    if hard < 16384:
        cure = "start it with ulimit -Hn 1048576, or LimitNOFILE=1048576 in the unit"
        return Check("Open files", "warning", found, "more commands are answered with 429", cure)
    return Check("Open files", "ok", found, "past that, commands are answered with 429")


def _file_table() -> Check:
    most = _sysctl("fs/file-max")
    found = f"fs.file-max is {most}; a box opens millions before its memory is full"
    if most < 1 << 24:
        cure = _set_for_good("files", "fs.file-max=9223372036854775807")
        return Check("File table", "warning", found, "one box can leave no open file for other boxes and users", cure)
    return Check("File table", "ok", found, "a box that opens files without end harms only itself")


def _inotify() -> Check:
    instances, watches = (_sysctl(f"fs/inotify/max_user_{kind}") for kind in ("instances", "watches"))
    found = f"{instances} instances and {watches} watches for each box"
    if instances < 128 or watches < 65536:
        return Check(
            "File watching",
            "warning",
            found,
            "development servers and tail -f in boxes fail with 'too many open files' or 'no space left'",
            _set_for_good("inotify", "fs.inotify.max_user_instances=8192", "fs.inotify.max_user_watches=1048576"),
        )
    return Check("File watching", "ok", found, "file watchers in boxes work")


def _processes() -> Check:
    most = _sysctl("kernel/pid_max")
    found = f"kernel.pid_max is {most}; a small box may have 1024, the largest 16384"
    if most < 65536:
        cure = _set_for_good("processes", "kernel.pid_max=4194304")
        return Check("Processes", "warning", found, "a few full boxes leave no process for this host", cure)
    return Check("Processes", "ok", found, "a box that forks without end harms only itself")


def _terminals() -> Check:
    most = _sysctl("kernel/pty/max")
    found = f"kernel.pty.max is {most}; a box may have 256, and 1024 are the host's own"
    if most < 16384:
        cure = _set_for_good("terminals", "kernel.pty.max=65536")
        return Check("Terminals", "warning", found, "a dozen boxes together leave none for other boxes", cure)
    return Check("Terminals", "ok", found, "a box that opens terminals without end harms only itself")


def _filters() -> Check:
    """A kernel that does not compile filters has no such limit; only root may read it."""
    most = _sysctl("net/core/bpf_jit_limit") if (_SYS / "net/core/bpf_jit_limit").exists() else _GIB
    found = f"net.core.bpf_jit_limit is {most}, for the seccomp filters of the whole machine"
    if most < _GIB:
        cure = _set_for_good("filters", f"net.core.bpf_jit_limit={_GIB}")
        follows = "a large box full of programs with filters may leave none for a moment: starts are tried again"
        return Check("Filters of calls", "warning", found, follows, cure)
    return Check("Filters of calls", "ok", found, "boxes and their programs have room for filters")


def _crashes() -> Check:
    """Not every machine reports crashes."""
    reported = (_SYS / "debug/exception-trace").exists() and _sysctl("debug/exception-trace") > 0
    if reported:
        cure = _set_for_good("crashes", "debug.exception-trace=0")
        found = "debug.exception-trace is 1: programs that crash, in boxes too, are named in the kernel's log"
        follows = "a box chooses 15 characters of those lines, newlines included"
        return Check("Kernel log", "warning", found, follows, cure)
    return Check("Kernel log", "ok", "crashes of programs are not in it", "boxes write to it when memory runs out only")


def _process_list() -> Check:
    """Processes of boxes are processes of this machine."""
    name = "Process list"
    if probes.processes_hidden():
        return Check(name, "ok", "/proc is mounted with hidepid", "users of this host do not see what boxes run")
    return Check(
        name,
        "ok",
        "/proc is mounted without hidepid",
        "every user of this host sees the command lines of programs in boxes by ps; where that matters, mount it with "
        "hidepid=invisible (mount -o remount,hidepid=invisible /proc, and in /etc/fstab for good)",
    )


def _set_for_good(topic: str, *values: str) -> str:
    """The command that sets values of the kernel now and, by the file that it writes, at each start of the machine."""
    return (
        f"sysctl -w {' '.join(values)} | tee /etc/sysctl.d/90-devboxd-{topic}.conf  # the file is for the next reboot"
    )


def _sysctl(name: str) -> int:
    return int((_SYS / name).read_text())


_CURES: dict[str, str] = {
    "Docker": f"iptables -I DOCKER-USER -i {wall.PREFIX}+ -j ACCEPT; "
    f"iptables -I DOCKER-USER -o {wall.PREFIX}+ -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT "
    "(and once more after each start of Docker)",
    "ufw": f"ufw route allow from {_POOLS}",
    "firewalld": f"firewall-cmd --permanent --zone=trusted --add-source={_POOLS} && firewall-cmd --reload",
    "": f"let it accept forwarded packets from interfaces {wall.PREFIX}*, and answers to them",
}


def _neighbours(root: bool) -> Iterator[Check]:
    """Other programs that filter the packets which this host forwards."""
    names = [name for name, present in probes.firewalls().items() if present]
    blocking = probes.forward_blockers() if root else []
    name = "Firewalls"
    if blocking:
        culprits = [name for name in names if name in _CURES] or [""]
        yield Check(
            name,
            "warning",
            f"{', '.join(names) or 'another program'} drops forwarded packets (in {', '.join(blocking)})",
            "boxes may reach nothing outside",
            "; ".join(_CURES[culprit] for culprit in culprits),
        )
    elif names:
        found = f"{', '.join(names)} found" + ("" if root else "; its rules were not checked")
        yield Check(name, "ok", found, "it forwards what boxes send" if root else "it may stop what boxes send")
    else:
        yield Check(name, "ok", "no other one found", "this host forwards what boxes send, as serve switches on")


def _figures() -> Check:
    """What commands in boxes are told of memory and processors."""
    if (lack := lxcfs.lack()) is None:
        return Check("Figures in boxes", "ok", "lxcfs is installed", "free, top and uptime in a box show the box's own")
    return Check(
        "Figures in boxes",
        "warning",
        lack,
        "free, top, uptime, /proc/meminfo and /proc/cpuinfo in a box show the machine's figures; the limits of the box "
        "hold all the same, and nproc and runtimes that read cgroups (JVM, .NET, Go, Rust, node) know them",
        "modprobe fuse" if "FUSE" in lack else "apt-get install lxcfs, and start the server again",
    )


def _selinux() -> Check:
    if probes.selinux_enforces():
        return Check(
            "SELinux",
            "warning",
            "enforcing",
            "boxes get no label of their own; a policy may forbid the runtime to start them",
            "look for denials with ausearch -m avc, and allow what they name",
        )
    return Check("SELinux", "ok", "not enforcing", "nothing stands in the way of the runtime")


def _names(settings: Settings) -> Iterator[Check]:
    try:
        direct, every = network.direct_servers(settings), network.servers(settings)
    except SetupError:
        return  # told among the settings
    if direct:
        yield Check("Names", "ok", f"boxes ask {', '.join(direct)}", "by the same way as everything else outside")
    else:
        found = f"the server asks {', '.join(every)} for boxes"
        yield Check("Names", "ok", found, "inside each box, so that no port of this host is opened for it")


def _lan(settings: Settings) -> Check:
    if settings.deny_cidrs:
        return Check(
            "Network", "ok", f"denied: {', '.join(settings.deny_cidrs)}", "boxes reach everything else outside"
        )
    return Check(
        "Network",
        "warning",
        "no network is denied to boxes",
        "boxes reach every machine that this host reaches, those of the local network included",
        "set deny_cidrs, for example to 10.0.0.0/8,172.16.0.0/12,192.168.0.0/16",
    )


def _kernel(settings: Settings) -> Check:
    found = f"Linux {os.uname().release}, shared with all boxes"
    if settings.nested_user_namespaces:
        return Check(
            "Kernel",
            "warning",
            f"{found}, with user namespaces inside boxes allowed",
            "that opens more of the kernel to boxes; a hole in it is a hole in every wall",
            "switch nested_user_namespaces off where no browser or bwrap needs it, and keep the kernel up to date",
        )
    return Check("Kernel", "ok", found, "a hole in it is a hole in every wall: keep it up to date")
