"""What the root of a box meets when it pushes against the walls: one test for each line of them."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import signal
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
    calls = ["socket,1,1,0", "socket,2,1,0", "socket,10,1,0", "socket,16,3,0", "socket,17,3,0", "socketpair,1,1,0,@"]
    assert await errors(shared, *calls) == [0] * 6


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
    assert len(bundle.CAPABILITIES) == 14
    assert not mask & (1 << 19 | 1 << 21 | 1 << 12)
    for pid in ("1", "self"):
        lines = await shared.sh(f"grep Cap /proc/{pid}/status")
        sets = {line.split(":")[0]: int(line.split()[1], 16) for line in lines.splitlines()}
        assert sets == {"CapInh": 0, "CapPrm": mask, "CapEff": mask, "CapBnd": mask, "CapAmb": 0}


_CAPABILITY = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_KILL": 5, "CAP_SETGID": 6,
    "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_RAW": 13, "CAP_SYS_CHROOT": 18,
    "CAP_MKNOD": 27, "CAP_AUDIT_WRITE": 29, "CAP_SETFCAP": 31,
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
    for path in (*bundle.READ_ONLY, "/sys", "/sys/fs/cgroup"):
        assert path not in mounts or "ro" in mounts[path].split(","), path
    assert {"/proc/sys", "/proc/bus", "/proc/irq", "/sys", "/sys/fs/cgroup"} <= set(mounts)
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
