"""Ways out of a devbox, tried by its user who has become root there (sudo); each says which wall stops it.

Every attempt is a line of a list, and a script in the devbox says how many it made and which of them succeeded. What
the engine's own tests try already (engine/test_walls.py, engine/test_network.py) is not tried again here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box

_BEGIN = """
import ctypes, errno, os, socket, stat, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
tried = 0
def attempt(name, work):
    global tried
    tried += 1
    try:
        found = work()
    except (OSError, ValueError):  # the latter is what setrlimit makes of a refusal
        return
    if found is not None and found is not False:
        print("OUT:", name, str(found)[:200])
def call(name, *arguments):
    def work():
        if libc.syscall(*(a if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments)) < 0:
            raise OSError(ctypes.get_errno(), name)
        return True
    attempt(name, work)
"""
_END = "\nprint(tried)\n"
_SETTINGS = [Path("/proc/sys/kernel") / name for name in ("hostname", "domainname", "core_pattern", "panic")]


def escapes(api: Api, box: str, script: str, *words: str) -> tuple[int, list[str]]:
    """Run a script as root of the devbox: how many attempts it made, and what got out."""
    path = f"/tmp/{uuid.uuid4().hex}.py"
    api.write(box, path, _BEGIN + script + _END)
    view = api.run(box, f"sudo -n python3 {path} {' '.join(words)}")
    assert view["exit_status"] == 0, view
    *out, tried = view["stdout"].splitlines()
    return int(tried), out


@pytest.fixture(scope="module")
def secret(server: Server) -> Iterator[Path]:
    """A file of the host that everybody who finds it may read and write; its content is its name."""
    folder = server.folder / uuid.uuid4().hex
    folder.mkdir()
    path = folder / uuid.uuid4().hex
    path.write_text(path.name)
    folder.chmod(0o777)
    path.chmod(0o666)
    server.folder.chmod(0o755)
    yield path
    path.unlink()
    folder.rmdir()


@contextlib.contextmanager
def bystander_on_the_host() -> Iterator[subprocess.Popen[bytes]]:
    """A process outside of every box."""
    with subprocess.Popen(["sleep", "infinity"]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(autouse=True)
def the_host_stays_as_it_was(secret: Path) -> Iterator[None]:
    """After every test: the host's settings, its file, and its process table."""
    before = [path.read_text() for path in _SETTINGS]
    with bystander_on_the_host() as bystander:
        yield
        assert bystander.poll() is None
    assert [path.read_text() for path in _SETTINGS] == before
    assert secret.read_text() == secret.name
    assert os.listdir(secret.parent) == [secret.name]


def test_files_of_the_host_are_not_reached_by_any_path(api: Api, box: str, secret: Path) -> None:
    """Wall: the mount namespace, whose root is the box's own, and in which nothing else of the host is mounted."""
    script = """
path = sys.argv[1]
def read(name):
    attempt(name, lambda: open(name).read())
for root in ("", "/..", "/" + "../" * 40, "/proc/1/root", "/proc/1/root/..", "/proc/1/cwd", "/proc/self/root/..",
             "/proc/self/cwd/" + "../" * 40, "/proc/thread-self/root/../..", "/dev/fd/../root/.."):
    read(root + path)
for line in open("/proc/self/mountinfo"):
    read(line.split()[4] + path)
    read(line.split()[4] + line.split()[3] + path)
os.symlink("/.." + path, "/tmp/link")
read("/tmp/link")
os.symlink("/proc/1/root", "/tmp/root")
read("/tmp/root" + path)
outside = os.open("/", os.O_RDONLY)
os.mkdir("/tmp/cell")
os.chroot("/tmp/cell")
os.fchdir(outside)
for _ in range(40):
    os.chdir("..")
os.chroot(".")
read(path)
"""
    tried, out = escapes(api, box, script, str(secret))
    assert (tried > 30, out) == (True, [])
    for path in (
        f"/..{secret}",
        f"/proc/1/root{secret}",
        f"/proc/self/root/..{secret}",
        "/tmp/link",
        f"/tmp/root{secret}",
    ):
        answer = api.http.post(f"/v1/devboxes/{box}/read_file_contents", json={"file_path": path})
        assert answer.status_code in (400, 403, 404), answer.text
        assert secret.name not in answer.text.replace(str(secret), "")


@pytest.mark.parametrize("shell", [None, "named"])
def test_commands_inherit_no_descriptor_of_the_host(api: Api, box: str, shell: str | None) -> None:
    """Wall: every descriptor of the agent closes on exec; a command has its three, pipes or /dev/null."""
    command = "for p in self 1; do sudo -n ls -l /proc/$p/fd 2>&1; done; ls -l /proc/$$/fd"
    shown = api.run(box, command, **({"shell_name": shell} if shell else {}))["stdout"]
    targets = [line.split(" -> ")[1] for line in shown.splitlines() if " -> " in line]
    assert len(targets) >= 6
    own = ("pipe:[", "/dev/null", "/proc/", "/run/devboxd/", "/memfd:")
    assert [target for target in targets if not target.startswith(own)] == []
    assert "cannot" in shown, "the descriptors of pid 1 are nobody's"


def test_every_descriptor_of_pid_1_closes_on_exec(api: Api, box: str, server: Server) -> None:
    """Wall: the same; behind it a child closes what it inherited, so this is not seen from inside the box."""
    reading, shell = api.start(box, "cat", attach_stdin=True), api.start(box, "cat", attach_stdin=True, shell_name="s")
    agent = Path(f"/proc/{server.agent(box)}/fdinfo")
    flags = {}
    for path in agent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed while we look
            flags[int(path.name)] = int(path.read_text().split()[3], 8)
    assert len(flags) > 12
    assert [number for number in flags if number > 2 and not flags[number] & os.O_CLOEXEC] == []
    for execution in (reading, shell):
        api.send(box, execution, signal="EOF")
        api.wait(box, execution)


def test_neither_agent_nor_other_devboxes_can_be_spoken_to(api: Api, box: str, secret: Path) -> None:
    """Walls: the network namespace, to which abstract sockets belong, and the mount namespace for those with a path."""
    other = api.create()
    api.write(other, f"/home/user/{secret.name}", "of another devbox")
    api.write(box, f"/home/user/{secret.name}-own", "of this devbox")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("\0" + secret.name)
        listening.listen()
        script = """
token = sys.argv[1]
def connect(address, kind):
    with socket.socket(socket.AF_UNIX, kind) as s:
        s.connect(address)
    return True
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
    attempt("abstract socket", lambda: connect("\\0" + token, kind))
attempt("sockets of the kernel's list", lambda: "agent.sock" in open("/proc/net/unix").read())
own = 0
for place, folders, files in os.walk("/", onerror=None):
    if place == "/":
        folders[:] = [name for name in folders if name not in ("proc", "sys", "usr")]
    own += token + "-own" in files
    for name in files:
        attempt(place + "/" + name, lambda: name == token or name == "agent.sock" or None)
assert own == 1
"""
        tried, out = escapes(api, box, script, secret.name)
    assert (tried > 100, out) == (True, [])
    api.shutdown(other)


def test_no_setting_trigger_or_limit_of_the_kernel_opens_for_writing(api: Api, box: str) -> None:
    """Walls: /proc/sys and its kin are mounted read-only, /sys and the cgroups too, and remounting wants CAP_SYS_ADMIN.

    The files are opened and not written, so that a missing wall does no harm.
    """
    script = """
def writable(path):
    opened = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    hidden = os.fstat(opened).st_rdev == os.stat("/dev/null").st_rdev
    os.close(opened)
    return not hidden
for top in ("/proc/sys", "/proc/irq", "/proc/bus", "/proc/fs", "/proc/driver", "/proc/scsi", "/proc/acpi", "/sys"):
    for place, _, files in os.walk(top):
        for name in files:
            attempt(place + "/" + name, lambda: writable(place + "/" + name))
for name in ("sysrq-trigger", "kcore", "mtrr", "timer_list", "sched_debug", "latency_stats", "kpageflags"):
    attempt(name, lambda: writable("/proc/" + name))
for name in ("tasks", "cgroup.procs", "release_agent", "memory.max", "cpu.max", "pids.max", "devices.allow"):
    attempt(name, lambda: writable("/sys/fs/cgroup/" + name))
attempt("a cgroup of its own", lambda: os.mkdir("/sys/fs/cgroup/own") or True)
for place in (b"/proc/sys", b"/sys", b"/sys/fs/cgroup", b"/proc/sysrq-trigger"):
    call("remount " + place.decode(), 165, b"none", place, 0, 32 | 4096, 0)
    call("unmount " + place.decode(), 166, place, 2)
"""
    tried, out = escapes(api, box, script)
    assert (tried > 500, out) == (True, [])


def test_no_disk_or_memory_of_the_host_opens(api: Api, box: str) -> None:
    """Wall: the user namespace (making a device wants CAP_MKNOD on the host); behind it every mount is nodev."""
    disks = [line.split()[:2] for line in Path("/proc/partitions").read_text().splitlines()[2:]]
    root = os.stat("/").st_dev
    numbers = [f"b:{major}:{minor}" for major, minor in disks] + [f"b:{os.major(root)}:{os.minor(root)}"]
    numbers += ["b:8:0", "b:7:0", "b:259:0", "c:1:1", "c:1:2", "c:1:4", "c:1:11", "c:4:0", "c:10:229", "c:10:232"]
    numbers += ["c:10:200", "c:10:237", "c:202:0", "c:10:223", "c:195:0", "c:226:0"]
    script = """
def make_and_open(folder, kind, major, minor):
    path = folder + "/device"
    os.mknod(path, 0o666 | (stat.S_IFBLK if kind == "b" else stat.S_IFCHR), os.makedev(major, minor))
    return "made " + path
for word in sys.argv[1:]:
    kind, major, minor = word.split(":")
    for folder in ("/tmp", "/dev", "/dev/shm", "/run", "/root"):
        attempt(word, lambda: make_and_open(folder, kind, int(major), int(minor)))
for name in ("mem", "kmsg", "kvm", "fuse", "loop-control", "vda", "sda", "net/tun", "vhost-net", "vsock"):
    attempt(name, lambda: os.open("/dev/" + name, os.O_RDONLY))
"""
    tried, out = escapes(api, box, script, *numbers)
    assert (tried > 5 * len(numbers), out) == (True, [])


def test_nothing_can_be_mounted(api: Api, box: str) -> None:
    """Walls: seccomp refuses every call that mounts; behind it CAP_SYS_ADMIN is not in the bounding set."""
    script = """
os.makedirs("/tmp/place", exist_ok=True)
for kind in ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "bpf", "devpts", "devtmpfs",
             "tmpfs", "mqueue", "ramfs", "overlay", "fuse", "nfs", "9p", "ext4", "hugetlbfs", "binfmt_misc"):
    call("mount " + kind, 165, b"none", b"/tmp/place", kind.encode(), 0, b"")
    call("fsopen " + kind, 430, kind.encode(), 0)
for source in (b"/", b"/proc", b"/proc/1/root", b"/sys", b"/dev"):
    call("bind " + source.decode(), 165, source, b"/tmp/place", 0, 4096 | 16384, 0)
    call("open_tree", 428, -100, source, 1 | os.O_CLOEXEC)
call("pivot_root", 155, b"/tmp", b"/tmp/place")
call("make shared", 165, 0, b"/", 0, 1 << 20 | 16384, 0)
call("swapon", 167, b"/tmp/place", 0)
call("a mount namespace", 272, 0x20000)
call("a user namespace", 272, 0x10000000)
"""
    tried, out = escapes(api, box, script)
    assert (tried > 50, out) == (True, [])


def test_calls_that_act_on_the_kernel_itself_are_refused(api: Api, box: str) -> None:
    """Wall: seccomp, which sudo does not lift; the capabilities for most of them are missing besides."""
    script = """
call("keyctl: the session's keys", 250, 0, -3, 0)
call("add_key", 248, b"user", b"name", b"x", 1, -3)
call("request_key", 249, b"user", b"name", 0, -3)
for command in (0, 5, 17):
    call("bpf", 321, command, bytes(128), 128)
call("kexec_load", 246, 0, 0, 0, 0)
call("kexec_file_load", 320, 0, 0, 0, b"", 0)
call("init_module", 175, bytes(64), 64, b"")
call("finit_module", 313, 0, b"", 0)
call("delete_module", 176, b"overlay", 0)
call("perf_event_open", 298, bytes(128), 0, -1, -1, 0)
call("userfaultfd", 323, 0)
call("io_uring_setup", 425, 4, bytes(128))
call("open_by_handle_at", 304, -100, bytes(64), 0)
call("reboot", 169, 0xFEE1DEAD, 672274793, 0)
call("sethostname", 170, b"taken", 5)
call("settimeofday", 164, bytes(16), 0)
call("syslog", 103, 3, bytes(16), 16)
call("iopl", 172, 3)
attempt("VSOCK", lambda: socket.socket(40, socket.SOCK_STREAM))
attempt("ALG", lambda: socket.socket(38, socket.SOCK_SEQPACKET))
"""
    assert escapes(api, box, script) == (22, [])


def test_processes_of_the_host_are_out_of_reach(api: Api, box: str, server: Server) -> None:
    """Wall: the pid namespace; a number of the host names nobody in the box, and -1 means all of the box alone."""
    other = api.create()
    with bystander_on_the_host() as bystander:
        script = """
page = ctypes.create_string_buffer(16)
vector = struct.pack("=2Q", ctypes.addressof(page), 16)
for pid in map(int, sys.argv[1:]):
    attempt("see", lambda: os.listdir("/proc/%d" % pid))
    for number in (0, 9, 19):
        attempt("signal", lambda: os.kill(pid, number) or True)
        attempt("signal the group", lambda: os.killpg(pid, number) or True)
    attempt("pidfd", lambda: os.pidfd_open(pid))
    call("ptrace", 101, 16, pid, 0, 0)
    call("seize", 101, 0x4206, pid, 0, 0)
    call("read its memory", 310, pid, vector, 1, vector, 1, 0)
    call("kcmp", 312, pid, os.getpid(), 0, 0, 0)
    attempt("scheduling", lambda: os.sched_setaffinity(pid, {0}) or True)
    attempt("priority", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19) or True)
    call("limits", 302, pid, 7, bytes(16), 0)
"""
        tried, out = escapes(
            api, box, script, str(bystander.pid), str(os.getpid()), str(server.pid), str(server.agent(other))
        )
        assert (tried, out) == (4 * 15, [])
        api.run(box, "sudo -n python3 -c 'import os; os.kill(-1, 9)'")
        assert bystander.poll() is None
    assert api.output(other, "echo the neighbour lives") == "the neighbour lives\n"
    assert api.output(box, "echo alive") == "alive\n"
    api.shutdown(other)


def test_namespaces_of_the_host_cannot_be_entered(api: Api, box: str) -> None:
    """Walls: seccomp refuses setns; pid 1 is not dumpable; the kernel names no parent outside of the box."""
    script = """
import fcntl
for name in ("user", "net", "mnt", "pid", "ipc", "uts", "cgroup", "time"):
    attempt("open pid 1's " + name, lambda: os.open("/proc/1/ns/" + name, os.O_RDONLY))
    own = os.open("/proc/self/ns/" + name, os.O_RDONLY)
    call("setns " + name, 308, own, 0)
    if name in ("user", "pid"):
        attempt("parent of " + name, lambda: fcntl.ioctl(own, 0xB702))
    if name == "user":
        attempt("owner of " + name, lambda: fcntl.ioctl(own, 0xB701))
    if name == "mnt":
        attempt("next to " + name, lambda: fcntl.ioctl(own, 0xB80B, bytearray(16)))
call("setns by pid", 308, os.pidfd_open(os.getpid()), 0x20000)
"""
    tried, out = escapes(api, box, script)
    assert (tried, out) == (21, [])


def test_root_of_a_devbox_raises_none_of_its_limits(api: Api, box: str) -> None:
    """Walls: the user namespace, as what lifts limits counts on the host alone; and no capability to do it anyway."""
    script = """
import resource
for name in (n for n in dir(resource) if n.startswith("RLIMIT_")):
    soft, hard = resource.getrlimit(getattr(resource, name))
    if hard != resource.RLIM_INFINITY and name != "RLIMIT_CORE":  # setting that one is said to succeed and does nothing
        attempt(name, lambda: resource.setrlimit(getattr(resource, name), (soft, hard + 1)) or True)
        attempt(name, lambda: resource.setrlimit(getattr(resource, name), (soft, resource.RLIM_INFINITY)) or True)
attempt("nice", lambda: os.setpriority(os.PRIO_PROCESS, 0, -1) or True)
for policy in (os.SCHED_FIFO, os.SCHED_RR):
    attempt("real time", lambda: os.sched_setscheduler(0, policy, os.sched_param(1)) or True)
call("deadline", 314, 0, struct.pack("=IIQiIQQQII", 56, 6, 0, 0, 0, 10 ** 6, 10 ** 7, 10 ** 7, 0, 0), 0)
call("real-time input and output", 251, 1, 0, 1 << 13)
call("lock much memory", 151, 1 | 2)
def spared():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("-1")
    return True
attempt("be spared when memory runs out", spared)
"""
    tried, out = escapes(api, box, script)
    assert (tried > 15, out) == (True, [])
