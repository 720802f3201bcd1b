"""Which system calls a box may make. Compiled once per server; a call that no rule names answers ENOSYS.

ENOSYS rather than EPERM for the unnamed, because libraries then take the older call that they know how to use; the
calls that are refused on purpose answer EPERM. Only the machine's own architecture has rules: each call by way of
i386 (whose `socketcall` hides its arguments from filters) or x32 is ENOSYS.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from devboxd.errors import SetupError

ALLOWED = """
accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown32 chroot
clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
fchown32 fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64
fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv
futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid
geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority
getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid
gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
ioprio_get ioprio_set ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown32 lgetxattr
link linkat listen listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64
madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall
mmap mmap2 modify_ldt mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap
name_to_handle_at nanosleep newfstatat _newselect open openat openat2 pause pidfd_open pidfd_send_signal pipe pipe2
pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 process_mrelease
process_vm_readv process_vm_writev pselect6 pselect6_time64 ptrace pwrite64 pwritev pwritev2 read readahead readlink
readlinkat readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename
renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo sched_get_priority_max sched_get_priority_min
sched_getaffinity sched_getattr sched_getparam sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64
sched_setaffinity sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop
semtimedop semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area
set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer setpgid
setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setsid
setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaction sigaltstack signal signalfd
signalfd4 sigpending sigprocmask sigreturn sigsuspend splice stat stat64 statfs statfs64 statmount statx symlink
symlinkat sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
timer_gettime timer_gettime64 timer_settime timer_settime64 timerfd_create timerfd_gettime timerfd_gettime64
timerfd_settime timerfd_settime64 times tkill truncate truncate64 ugetrlimit umask uname unlink unlinkat utime
utimensat utimensat_time64 utimes vfork vmsplice wait4 waitid waitpid write writev
""".split()  # noqa: SIM905
"""What ordinary programs need; none of it reaches past the box's own namespaces."""

REFUSED = """
acct add_key bpf clock_settime clock_settime64 delete_module fanotify_init finit_module get_mempolicy init_module
io_uring_enter io_uring_register io_uring_setup ioperm iopl kcmp kexec_file_load kexec_load keyctl lookup_dcookie
mbind migrate_pages mount_setattr move_pages nfsservctl open_by_handle_at perf_event_open pidfd_getfd
process_madvise quotactl quotactl_fd reboot request_key set_mempolicy set_mempolicy_home_node setdomainname
sethostname settimeofday stime swapoff swapon syslog userfaultfd uselib ustat vhangup
""".split()  # noqa: SIM905
"""Refused with EPERM: they act on the whole machine, or are the kernel's most attacked corners."""

NAMESPACES = """
fsconfig fsmount fsopen fspick mount move_mount open_tree pivot_root setns umount umount2
""".split()  # noqa: SIM905
"""Refused too, unless boxes may make user namespaces: then they act on those alone."""

_STREAM, _DGRAM, _RAW, _PACKET = 1, 2, 3, 10
_SOCKETS: dict[tuple[int, int], tuple[int, ...]] = {
    (socket.AF_INET, _STREAM): (0, socket.IPPROTO_TCP),
    (socket.AF_INET, _DGRAM): (0, socket.IPPROTO_UDP, socket.IPPROTO_ICMP),
    (socket.AF_INET6, _STREAM): (0, socket.IPPROTO_TCP),
    (socket.AF_INET6, _DGRAM): (0, socket.IPPROTO_UDP, socket.IPPROTO_ICMPV6),
}
"""The protocols of each family and type. Datagrams of ICMP are those of ping, which needs no privilege for them."""
_NETLINK = (0, 4, 15)
"""Routes and addresses, lists of sockets, devices that come and go (of which a box hears nothing)."""
_SOCKET_FLAGS = 0x80800
_SOL_SOCKET = 1
_FILTERS = (26, 50, 51, 52)
"""Options that attach a BPF program: all of them share a limit of the whole machine, seccomp filters included."""
_TERMINALS = (0x5412, 0x541C, 0x5423)
"""TIOCSTI types for the other users of a terminal, TIOCLINUX is the console's, TIOCSETD loads modules."""
_OWNERS = {"chown": 1, "fchown": 1, "lchown": 1, "fchownat": 2}
"""Calls that change an owner: where the uid stands, the gid comes next."""
_PERSONALITIES = 0x0008 | 0x20000 | 0x40000 | 0x200000
"""PER_LINUX32, UNAME26, ADDR_NO_RANDOMIZE (`setarch -R`, gdb) and ADDR_COMPAT_LAYOUT, in any combination."""
_NEW_NAMESPACES = 0x7E020000
_NEW_TIME_NAMESPACE = 0x80
_RLIMIT_CORE = 4
_LOW, _UPPER_HALF, _ALL = 0xFFFFFFFF, 0xFFFF0000, 0xFFFFFFFFFFFFFFFF

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_BAD_ARCH = 2
_COMPARISONS = {"SCMP_CMP_NE": 1, "SCMP_CMP_EQ": 4, "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7}


@dataclass(frozen=True)
class Argument:
    """A condition on one argument of a call; with a mask `value` is the mask and `second` what must remain."""

    index: int
    operator: str
    value: int
    second: int = 0


@dataclass(frozen=True)
class Rule:
    """Calls that answer `error` (None: are allowed) when all conditions hold."""

    names: tuple[str, ...]
    error: int | None = None
    arguments: tuple[Argument, ...] = ()


def rules(nested_user_namespaces: bool) -> list[Rule]:
    """The whole table. Each call has either one rule without conditions, or rules that exclude each other."""
    table = [Rule(tuple(ALLOWED)), Rule(tuple(REFUSED), errno.EPERM), Rule(("clone3",), errno.ENOSYS)]
    if nested_user_namespaces:
        table.append(Rule(("clone", "unshare", *NAMESPACES)))
    else:
        table.append(Rule(tuple(NAMESPACES), errno.EPERM))
        table += _without_flags("clone", _NEW_NAMESPACES)
        table += _without_flags("unshare", _NEW_NAMESPACES | _NEW_TIME_NAMESPACE)
    table += [Rule(("personality",), None, (_masked(0, _ALL & ~_PERSONALITIES, 0),))]
    table += [Rule(("personality",), None, (_equal(0, _LOW),)), Rule(("sync",), 0)]
    return [*table, *_sockets(), *_options(), *_owners(), *_core_limit()]


def _equal(index: int, value: int) -> Argument:
    return Argument(index, "SCMP_CMP_EQ", value)


def _masked(index: int, mask: int, value: int) -> Argument:
    return Argument(index, "SCMP_CMP_MASKED_EQ", mask, value)


def _is(index: int, value: int) -> Argument:
    """An argument of 32 bits: the kernel never looks at the upper half of the register."""
    return _masked(index, _LOW, value)


def _others(index: int, values: Iterable[int]) -> Iterator[Argument]:
    """Conditions of which exactly one holds for an argument of 32 bits that is none of the values."""
    prefixes = {0}
    for bit in (1 << n for n in reversed(range(32))):
        mask = _LOW & ~(bit - 1)
        known = {value & mask for value in values}
        for prefix in sorted(prefixes):
            yield from (_masked(index, mask, other) for other in (prefix, prefix | bit) if other not in known)
        prefixes = known


def _without_flags(name: str, flags: int) -> Iterator[Rule]:
    """Allow a call whose first argument has none of the flags, refuse it with any one of them."""
    yield Rule((name,), None, (_masked(0, flags, 0),))
    for bit in (1 << n for n in range(32) if flags >> n & 1):
        yield Rule((name,), errno.EPERM, (_masked(0, bit, bit),))


def _sockets() -> Iterator[Rule]:
    """Only the usual families and protocols: others lead to the hypervisor and to uncounted memory, or load modules."""
    families = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET)
    for name in ("socket", "socketpair"):
        yield Rule((name,), None, (_is(0, socket.AF_UNIX),))
        for other in _others(0, families):
            yield Rule((name,), errno.EAFNOSUPPORT, (other,))
    for family in families[1:]:
        yield Rule(("socketpair",), errno.EOPNOTSUPP, (_is(0, family),))
    yield Rule(("socket",), errno.EPERM, (_is(0, socket.AF_PACKET),))
    yield from _protocols((_is(0, socket.AF_NETLINK),), _NETLINK)
    for family in (socket.AF_INET, socket.AF_INET6):
        for kind in range(16):
            which = (_is(0, family), _masked(1, _LOW & ~_SOCKET_FLAGS, kind))
            if protocols := _SOCKETS.get((family, kind)):
                yield from _protocols(which, protocols)
            else:
                yield Rule(("socket",), errno.EPERM if kind in (_RAW, _PACKET) else errno.ESOCKTNOSUPPORT, which)


def _protocols(which: tuple[Argument, ...], protocols: tuple[int, ...]) -> Iterator[Rule]:
    for protocol in protocols:
        yield Rule(("socket",), None, (*which, _is(2, protocol)))
    for other in _others(2, protocols):
        yield Rule(("socket",), errno.EPROTONOSUPPORT, (*which, other))


def _options() -> Iterator[Rule]:
    """All options of sockets but programs for the kernel, and all requests to devices but three of terminals."""
    at_sockets = _is(1, _SOL_SOCKET)
    for level in _others(1, (_SOL_SOCKET,)):
        yield Rule(("setsockopt",), None, (level,))
    for option in _others(2, _FILTERS):
        yield Rule(("setsockopt",), None, (at_sockets, option))
    for number in _FILTERS:
        yield Rule(("setsockopt",), errno.EPERM, (at_sockets, _is(2, number)))
    for request in _others(1, _TERMINALS):
        yield Rule(("ioctl",), None, (request,))
    for number in _TERMINALS:
        yield Rule(("ioctl",), errno.EPERM, (_is(1, number),))


def _owners() -> Iterator[Rule]:
    """Giving a file to an id past 65535, which no process of a box can have, succeeds and leaves the owner as it is.

    -1 stands for no change.
    """
    for name, uid in _OWNERS.items():
        gid = uid + 1
        for large in _large(uid):
            yield Rule((name,), 0, (large,))
        for known in (_masked(uid, _UPPER_HALF, 0), _is(uid, _LOW)):
            yield Rule((name,), None, (known, _masked(gid, _UPPER_HALF, 0)))
            yield Rule((name,), None, (known, _is(gid, _LOW)))
            for large in _large(gid):
                yield Rule((name,), 0, (known, large))


def _large(index: int) -> Iterator[Argument]:
    """Conditions of which exactly one holds for an argument from 65536 to 2^32 - 2: by its first bit that differs."""
    for n in range(16, 31):
        yield _masked(index, _LOW & -(1 << n), 1 << n)
    for n in range(31):
        yield _masked(index, _LOW & -(1 << n), _LOW & -(2 << n))


def _core_limit() -> Iterator[Rule]:
    """Setting RLIMIT_CORE succeeds without effect.

    A limit of exactly 1 keeps the kernel from starting the host's core handler; 0, which sudo sets, would not.
    """
    for name, index in (("setrlimit", 0), ("prlimit64", 1)):
        for resource in (n for n in range(16) if n != _RLIMIT_CORE):
            yield Rule((name,), None, (_equal(index, resource),))
    core = _is(1, _RLIMIT_CORE)
    yield Rule(("setrlimit",), 0, (_is(0, _RLIMIT_CORE),))
    yield Rule(("prlimit64",), None, (core, _equal(2, 0)))
    yield Rule(("prlimit64",), 0, (core, Argument(2, "SCMP_CMP_NE", 0)))


def oci(table: list[Rule]) -> dict[str, Any]:
    """The table as `linux.seccomp` of a config.json, for runtimes that compile it themselves."""
    calls = []
    for rule in table:
        call: dict[str, Any] = {"names": list(rule.names), "action": "SCMP_ACT_ALLOW"}
        if rule.error is not None:
            call |= {"action": "SCMP_ACT_ERRNO", "errnoRet": rule.error}
        if rule.arguments:
            call["args"] = [
                {"index": a.index, "op": a.operator, "value": a.value, "valueTwo": a.second} for a in rule.arguments
            ]
        calls.append(call)
    return {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.ENOSYS, "syscalls": calls}


class _Comparison(ctypes.Structure):
    _fields_ = (
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("value", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    )


def compile_filter(table: list[Rule]) -> bytes:
    """The table as a program for the kernel (an array of sock_filter). Raises SetupError without libseccomp."""
    library = _library()
    context = library.seccomp_init(ctypes.c_uint32(_ERRNO | errno.ENOSYS))
    if not context:
        raise SetupError("cannot compile the seccomp filter: libseccomp refused; look at the machine's memory")
    try:
        _check(library.seccomp_attr_set(ctypes.c_void_p(context), _BAD_ARCH, ctypes.c_uint32(_ERRNO | errno.ENOSYS)))
        for rule in table:
            _add(library, context, rule)
        return _export(library, context)
    finally:
        library.seccomp_release(ctypes.c_void_p(context))


def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError as error:
        raise SetupError(
            f"cannot compile the seccomp filter: {error}; install libseccomp (Debian, Ubuntu: libseccomp2)"
        ) from error
    library.seccomp_init.restype = ctypes.c_void_p
    return library


def _add(library: ctypes.CDLL, context: int, rule: Rule) -> None:
    action = _ALLOW if rule.error is None else _ERRNO | rule.error
    comparisons = (_Comparison * max(1, len(rule.arguments)))(
        *(_Comparison(a.index, _COMPARISONS[a.operator], a.value, a.second) for a in rule.arguments)
    )
    for name in rule.names:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number == -1 or action == _ERRNO | errno.ENOSYS:
            continue  # an older libseccomp does not know it, or the default says the same: ENOSYS
        _check(
            library.seccomp_rule_add_array(
                ctypes.c_void_p(context), ctypes.c_uint32(action), number, len(rule.arguments), comparisons
            ),
            name,
        )


def _export(library: ctypes.CDLL, context: int) -> bytes:
    descriptor = os.memfd_create("seccomp")
    try:
        _check(library.seccomp_export_bpf(ctypes.c_void_p(context), descriptor))
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def _check(result: int, what: str = "the filter") -> None:
    if result < 0:
        raise SetupError(f"cannot compile the seccomp filter: {what}: {os.strerror(-result)}; update libseccomp")
