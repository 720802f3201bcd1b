"""What the root of a box meets when it pushes against the walls: one test for each line of them."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import platform
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devboxd.engine import bundle, seccomp
from devboxd.engine.base import Image, Resources
from support.engine import Box, Host

pytestmark = [pytest.mark.anyio, pytest.mark.box]

I386 = 0x40000003
NEWUSER, NEWNS = 0x10000000, 0x00020000
VSOCK, ALG, TIPC, BLUETOOTH = 40, 38, 30, 31


def number(name: str, architecture: int | None = None) -> int:
    """The number of a system call on this machine, or on another architecture."""
    library = seccomp._library()
    if architecture is None:
        return int(library.seccomp_syscall_resolve_name(name.encode()))
    return int(library.seccomp_syscall_resolve_name_arch(architecture, name.encode()))


async def errors(box: Box, *calls: str, way: str = "native", user: str = "root") -> list[int]:
    """The error of each call, written as `name,argument,...`; 0 for success."""
    words = []
    for call in calls:
        name, _, rest = call.partition(",")
        digits = number(name, I386 if way == "i386" else None)
        assert digits >= 0, name
        words.append(f"{digits},{rest}")
    result = await box.run("/probe", way, *words, user=user)
    return [int(line) for line in result.out.split()]


# seccomp


async def test_calls_on_the_whole_machine_are_refused(shared: Box) -> None:
    names = """io_uring_setup io_uring_enter io_uring_register bpf userfaultfd perf_event_open keyctl add_key
    request_key open_by_handle_at kexec_load kexec_file_load init_module finit_module delete_module mount umount2
    pivot_root setns fsopen open_tree move_mount mount_setattr swapon reboot settimeofday clock_settime sethostname
    kcmp pidfd_getfd acct quotactl syslog vhangup""".split()  # noqa: SIM905
    found = await errors(shared, *names)
    assert dict(zip(names, found, strict=True)) == dict.fromkeys(names, errno.EPERM)


async def test_clone3_and_unknown_calls_do_not_exist(shared: Box) -> None:
    assert await errors(shared, "clone3,@,88") == [errno.ENOSYS]
    assert (await shared.run("/probe", "native", "999")).out == f"{errno.ENOSYS}\n"


@pytest.mark.parametrize("call", ["socket", "socketpair"])
async def test_only_the_usual_families_of_sockets(shared: Box, call: str) -> None:
    refused = [*range(3, 10), *range(11, 16), *range(18, 50), 1 << 32 | VSOCK, 1 << 31, 1 << 63]
    found = await errors(shared, *(f"{call},{family},1,0,@" for family in refused))
    assert found == [errno.EAFNOSUPPORT] * len(refused)


async def test_the_usual_families_of_sockets_work(shared: Box) -> None:
    calls = ["socket,1,1,0", "socket,2,1,0", "socket,10,1,0", "socket,16,3,0", "socket,2,2,1", "socketpair,1,1,0,@"]
    assert await errors(shared, *calls) == [0] * 6
    assert await errors(shared, *calls[:1], *calls[4:], user="user") == [0] * 3


async def test_nothing_sends_raw_packets_and_ping_works(shared: Box) -> None:
    """SOCK_PACKET of AF_INET is AF_PACKET by its old name."""
    calls = ["socket,17,3,768", "socket,17,2,768", "socket,2,10,768", "socket,2,0x8080a,768", "socket,2,3,255"]
    assert await errors(shared, *calls) == [errno.EPERM] * 5
    for user in ("root", "user"):
        assert "1 received" in await shared.sh("ping -c1 -W5 127.0.0.1", user=user)
        assert "1 received" in await shared.sh("ping -c1 -W5 ::1", user=user)


async def test_sync_returns_at_once_and_what_is_written_for_good_is_so(shared: Box) -> None:
    assert await errors(shared, "sync", "fsync,0") == [0, errno.EINVAL]
    assert await shared.sh("sync; echo x >/tmp/file && sync /tmp/file && sync -f /tmp/file && cat /tmp/file") == "x"


async def test_owners_past_the_ids_of_a_box(shared: Box) -> None:
    """As archives of other systems have them: all of it is unpacked, and those files stay root's."""
    script = """
import io, tarfile
with tarfile.open("/tmp/strange.tgz", "w:gz") as archive:
    for name, owner in (("a", 197609), ("b", 4294967294), ("c", 1000)):
        member = tarfile.TarInfo(name)
        member.uid = member.gid = owner
        member.size, member.mode = 1, 0o4755
        archive.addfile(member, io.BytesIO(b"x"))
"""
    await shared.run("python3", "-c", script)
    unpack = "mkdir -p /tmp/s && cd /tmp/s && tar xzpf ../strange.tgz --numeric-owner && stat -c '%n %u %g %a' *"
    assert await shared.sh(unpack) == "a 0 0 4755\nb 0 0 4755\nc 1000 1000 4755"
    assert await shared.sh("chown 197609:1000 /tmp/s/c && stat -c '%u %g' /tmp/s/c") == "1000 1000"
    assert (await shared.run("chown", "0:197609", "/tmp/s/c", user="user")).status == 0, "nothing is changed"
    assert (await shared.run("setpriv", "--reuid=197609", "true")).status != 0


async def test_a_debugger_may_switch_random_addresses_off(shared: Box) -> None:
    show = "setarch -R sh -c 'grep stack /proc/self/maps; cat /proc/self/personality'"
    first, second = await shared.sh(show), await shared.sh(show)
    assert first == second
    assert first.endswith("00040000")
    assert (await shared.run("setarch", "-X", "true")).status != 0


async def test_a_box_has_a_share_of_the_terminals(shared: Box) -> None:
    script = """
import os
held = []
try:
    while len(held) < 5000:
        held.append(os.posix_openpt(os.O_RDWR) if hasattr(os, "posix_openpt") else os.open("/dev/ptmx", os.O_RDWR))
except OSError:
    print(len(held))
"""
    assert int(await shared.sh(f"python3 -c '{script.replace(chr(39), chr(34))}'")) <= 256


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other machines have no other entries")
@pytest.mark.parametrize("way", ["i386", "x32"])
async def test_no_other_entry_into_the_kernel(shared: Box, way: str) -> None:
    calls = ["getpid", "read,0,0,0", "unshare,0x10000000", "keyctl,0,0"]
    calls += ["socketcall,1,@", "socket,40,1,0"] if way == "i386" else ["socket,40,1,0"]
    words = []
    for call in calls:
        name, _, rest = call.partition(",")
        words.append(f"{number(name, I386 if way == 'i386' else None)},{rest}")
    result = await shared.run("/probe", way, *words)
    refused = {str(errno.ENOSYS), f"killed by {signal.SIGSYS.value}"}
    assert set(result.out.splitlines()) <= refused, result
    assert len(result.out.splitlines()) == len(calls)


async def test_no_new_user_namespaces(shared: Box) -> None:
    flags = [NEWUSER, NEWNS, NEWUSER | NEWNS, 0x40000000, 0x20000000, 0x08000000, 0x04000000, 0x02000000]
    found = await errors(
        shared, *(f"{call},{flag | 17 * (call == 'clone')}" for call in ("clone", "unshare") for flag in flags)
    )
    assert found == [errno.EPERM] * (2 * len(flags))
    assert await errors(shared, "unshare,0x80", "unshare,0x200") == [errno.EPERM, 0]
    assert (await shared.run("unshare", "--user", "true", user="user")).status != 0


@pytest.fixture
async def nested(image: Image, runtime: str, tmp_path: Path) -> AsyncIterator[Box]:
    async with Host(image, tmp_path / "state", runtime=runtime, nested_user_namespaces=True) as host:
        yield await host.box()


async def test_new_user_namespaces_by_the_setting(nested: Box) -> None:
    script = "unshare --user --map-root-user --mount bash -c 'mount -t tmpfs none /mnt && id -u'"
    assert await nested.sh(script, user="user") == "0"
    assert await errors(nested, "bpf", "keyctl", "io_uring_setup") == [errno.EPERM] * 3
    assert await errors(nested, "clone3,@,88") == [errno.ENOSYS]


# pid 1 and its descriptors


_ATTACK = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def error(result): return "open" if result >= 0 else ctypes.get_errno()
print(error(libc.ptrace(16, 1, 0, 0)), error(libc.ptrace(0x4206, 1, 0, 0)))
pidfd = os.pidfd_open(1)
print(error(libc.syscall(438, pidfd, 3, 0)))
for name in ("mem", "environ", "maps", "root/etc/passwd", "fd/0", "fd/3"):
    try:
        open("/proc/1/" + name, "rb").read(1)
        print(name, "open")
    except OSError as failure:
        print(name, failure.errno)
for name in ("root", "cwd", "exe", "ns/net", "fd/3"):
    try:
        os.readlink("/proc/1/" + name)
        print(name, "open")
    except OSError as failure:
        print(name, failure.errno)
"""


async def test_root_of_a_box_gets_nothing_out_of_pid_1(shared: Box) -> None:
    out = await shared.sh(f"python3 - <<'E'\n{_ATTACK}\nE")
    assert "open" not in out, out
    assert len(out.splitlines()) == 13


async def test_capabilities_are_the_usual_ones_without_ptrace(shared: Box) -> None:
    mask = sum(1 << _CAPABILITY[name] for name in bundle.CAPABILITIES)
    assert len(bundle.CAPABILITIES) == 11
    assert not mask & (1 << 19 | 1 << 21 | 1 << 12 | 1 << 13 | 1 << 27 | 1 << 29)
    for pid in ("1", "self"):
        lines = await shared.sh(f"grep Cap /proc/{pid}/status")
        sets = {line.split(":")[0]: int(line.split()[1], 16) for line in lines.splitlines()}
        assert sets == {"CapInh": 0, "CapPrm": mask, "CapEff": mask, "CapBnd": mask, "CapAmb": 0}


_CAPABILITY = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_KILL": 5, "CAP_SETGID": 6,
    "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10, "CAP_SYS_CHROOT": 18, "CAP_SETFCAP": 31,
}  # fmt: skip


# namespaces and ids


async def test_every_namespace_is_the_boxs_own(shared: Box) -> None:
    for name in ("user", "pid", "mnt", "ipc", "uts", "net", "cgroup"):
        assert os.readlink(f"/proc/{shared.pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"), name
    box_net = os.open(f"/proc/{shared.pid}/ns/net", os.O_RDONLY)
    box_user = os.stat(f"/proc/{shared.pid}/ns/user")
    owner = fcntl.ioctl(box_net, 0xB701)  # NS_GET_USERNS
    assert os.fstat(owner).st_ino == box_user.st_ino
    os.close(owner)
    os.close(box_net)


_TAKE_ALL = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
def timer(n):
    event, made = ctypes.create_string_buffer(64), ctypes.c_void_p()
    event[12:16] = (1).to_bytes(4, "little")  # SIGEV_NONE
    return libc.timer_create(1, event, ctypes.byref(made))
ways = {
    "instances": lambda n: libc.inotify_init(),
    "queues": lambda n: libc.mq_open(b"/%d.%d" % (os.getpid(), n), 0o100 | 2, 0o600, None),
    "timers": timer,
}
kind, most = sys.argv[1], int(sys.argv[2])
taken = 0
while taken < most and ways[kind](taken) >= 0:
    taken += 1
print(taken, flush=True)
if kind == "queues":
    for n in range(taken if most == 1 else 0):
        libc.mq_unlink(b"/%d.%d" % (os.getpid(), n))
if most > 1:
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["instances", "queues", "timers"])
async def test_what_the_kernel_counts_by_user_is_counted_for_each_box_alone(
    kind: str, image: Image, runtime: str, tmp_path: Path
) -> None:
    """Wall: the user namespace belongs to an id of the box's own. An ordinary user of one takes all that there is."""
    script = ["python3", "-c", _TAKE_ALL, kind]
    async with Host(image, tmp_path / "state", runtime=runtime) as host:
        greedy, other = await host.box(), await host.box()
        command = " ".join(map(shlex.quote, script))
        taken = await greedy.sh(
            f"(sleep 60 | {command} 100000 >/tmp/taken) & until [ -s /tmp/taken ]; do sleep 0.05; done; cat /tmp/taken",
            user="user",
        )
        assert 5 < int(taken) < 100000
        assert (await greedy.run(*script, "1", user="user")).out == "0\n", "it has no more"
        assert (await other.run(*script, "1", user="user")).out == "1\n"
        on_the_host = await asyncio.to_thread(
            subprocess.run, [*script, "1"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True
        )
        assert on_the_host.stdout == "1\n"
        box = os.open(f"/proc/{greedy.pid}/ns/user", os.O_RDONLY)
        owner = int.from_bytes(fcntl.ioctl(box, 0xB704, bytes(4)), "little")  # NS_GET_OWNER_UID
        os.close(box)
        assert owner == int((await greedy.sh("cat /proc/self/uid_map")).split()[1])


async def test_root_of_a_box_is_nobody_on_the_host(shared: Box) -> None:
    rows = (await shared.sh("cat /proc/self/uid_map /proc/self/gid_map")).splitlines()
    for row in rows:
        inside, outside, count = map(int, row.split())
        assert (inside, count) == (0, 65536)
        assert outside >= 1 << 29
    registered = Path("/etc/subuid").read_text()  # noqa: ASYNC240
    first = int(rows[0].split()[1])
    ranges = [line.split(":") for line in registered.splitlines() if line.startswith("devboxd-")]
    assert any(int(start) <= first < int(start) + int(count) for _, start, count in ranges)


# file systems and devices


async def test_the_kernels_own_files_are_read_only_or_hidden(shared: Box) -> None:
    for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/sys/x"):
        assert (await shared.run("bash", "-c", f"echo x >{path}")).status != 0, path
    mounts = dict(line.split()[1:4:2] for line in (await shared.sh("cat /proc/mounts")).splitlines())
    system = {path for path in mounts if path.startswith("/sys")}
    for path in (*bundle.READ_ONLY, *system):
        assert path not in mounts or "ro" in mounts[path].split(","), path
    assert {"/proc/sys", "/proc/bus", "/proc/irq", "/sys"} <= set(mounts)
    assert any(path.startswith("/sys/fs/cgroup") for path in system)
    assert await shared.sh("cat /proc/keys /proc/timer_list /proc/kcore /proc/interrupts 2>/dev/null | wc -c") == "0"
    assert await shared.sh("ls /proc/acpi /sys/firmware 2>/dev/null | grep -v : | wc -w") == "0"
    assert (await shared.run("mount", "-o", "remount,rw", "/proc/sys")).status != 0
    assert (await shared.run("mkdir", "/sys/fs/cgroup/own")).status != 0
    assert (await shared.run("bash", "-c", "echo 0 >/sys/fs/cgroup/cgroup.procs")).status != 0


async def test_the_box_sees_itself_at_the_root_of_its_cgroup(shared: Box) -> None:
    assert {line.split(":")[2] for line in (await shared.sh("cat /proc/self/cgroup")).splitlines()} == {"/"}


async def test_only_the_usual_devices(shared: Box) -> None:
    found = set((await shared.sh("find /dev \\( -type b -o -type c \\) -not -path '/dev/pts/*'")).split())
    assert found <= {f"/dev/{name}" for name in ("null", "zero", "full", "tty", "random", "urandom", "ptmx", "console")}
    assert (await shared.run("mknod", "/tmp/sda", "b", "8", "0")).status != 0
    assert (await shared.run("mknod", "/tmp/mem", "c", "1", "1")).status != 0


async def test_devices_in_an_image_do_not_open(image: Image, runtime: str, tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.mkdir()
    os.mknod(layer / "evil", 0o666 | 0o020000, os.makedev(1, 5))
    async with Host(Image("evil", (layer, *image.layers)), tmp_path / "state", runtime=runtime) as host:
        box = await host.box()
        assert await box.sh("stat -c %t:%T /evil") == "1:5"
        result = await box.run("head", "-c1", "/evil")
        assert (result.status, "Permission denied" in result.err) == (1, True)


async def test_folders_for_the_agent(shared: Box) -> None:
    assert await shared.sh("stat -c '%a %u %g' /run/devboxd") == "755 0 0"
    options = (await shared.sh("findmnt -no OPTIONS /run/devboxd || grep ' /run/devboxd ' /proc/mounts")).split(",")
    assert {"nosuid", "nodev"} <= set(" ".join(options).replace(" ", ",").split(","))
    assert (await shared.run("touch", "/run/devboxd/x", user="user")).status != 0
    assert int(await shared.sh("df --output=size -B1 /dev/shm | tail -n1")) >= 64 << 20
    assert int(await shared.sh("df --output=size -B1 /run | tail -n1")) <= 64 << 20


# limits


async def test_no_core_handler_of_the_host_ever_runs(shared: Box) -> None:
    show = "grep core /proc/self/limits"
    script = f"{show}; ulimit -c 0; {show}; sudo -n {show}; prlimit --core=0 {show}"
    rows = [line.split()[4:6] for line in (await shared.sh(script, user="user")).splitlines()]
    assert rows == [["1", "1"]] * 4
    direct = f"""
import ctypes, resource
libc, zero = ctypes.CDLL(None), ctypes.create_string_buffer(16)
for core in (4, 4 | 1 << 32):
    libc.syscall({number("setrlimit")}, ctypes.c_long(core), zero)
    libc.syscall({number("prlimit64")}, ctypes.c_long(0), ctypes.c_long(core), zero, ctypes.c_long(0))
print(resource.getrlimit(resource.RLIMIT_CORE))
"""
    assert (await shared.run("python3", "-c", direct)).out == "(1, 1)\n"


async def test_other_limits_can_be_lowered(shared: Box) -> None:
    assert await shared.sh("ulimit -n 100; ulimit -n; ulimit -s 1000; ulimit -s") == "100\n1000"


async def test_every_limit_is_set(shared: Box) -> None:
    names = {row["type"] for row in bundle.rlimits(Resources(1, 1 << 30))}
    assert len(names) == 14
    text = Path(f"/proc/{shared.pid}/limits").read_text()  # noqa: ASYNC240
    assert "Max locked memory         8388608" in text
    assert "Max realtime priority     0                    0" in text


async def test_memory_runs_out_for_commands_first(shared: Box) -> None:
    assert await shared.sh("cat /proc/1/oom_score_adj; cat /proc/self/oom_score_adj") == "0\n500"
    assert (await shared.run("bash", "-c", "echo -1000 >/proc/self/oom_score_adj")).status != 0


_FILL_SOCKETS = """
import socket
held, message = [], bytes(60000)
for _ in range(400):
    held.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    held[-1].bind(("127.0.0.1", 0))
    for _ in range(20):
        held[-1].sendto(message, held[-1].getsockname())
got = 0
for one in held:
    one.setblocking(False)
    try:
        while True:
            got += len(one.recv(1 << 16))
    except BlockingIOError:
        pass
print(got >> 20)
"""


async def test_what_sockets_keep_has_a_limit(shared: Box) -> None:
    """Wall: the memory of UDP and TCP: counted with the rest by version 2, and apart by version 1."""
    kept = int(await shared.sh(f"python3 -c '{_FILL_SOCKETS}'"))
    assert 1 < kept <= 64
    again = 'import socket; a, b = socket.socketpair(); s = socket.create_server(("127.0.0.1", 0))'
    talk = "c = socket.create_connection(s.getsockname()); c.sendall(bytes(99)); print(len(s.accept()[0].recv(99)))"
    assert await shared.sh(f"python3 -c '{again}; {talk}'") == "99"
