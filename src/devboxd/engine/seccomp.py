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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from devboxd.errors import SetupError

ALLOWED = """
accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown chown32 chroot
clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime clock_gettime64 clock_nanosleep
clock_nanosleep_time64 close close_range connect copy_file_range creat dup dup2 dup3 epoll_create epoll_create1
epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve execveat exit
exit_group faccessat faccessat2 fadvise64 fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2
fchown fchown32 fchownat fcntl fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64
fstatat64 fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv
futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid getegid32 geteuid
geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp getpid getppid getpriority
getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage getsid getsockname getsockopt gettid
gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch
io_cancel io_destroy io_getevents io_pgetevents io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set
ipc kill landlock_add_rule landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat
listen listmount listxattr listxattrat llistxattr _llseek lremovexattr lseek lsetxattr lstat lstat64 madvise
map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap
mmap2 modify_ldt mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend
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
setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 setsid setsockopt
setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaction sigaltstack signal signalfd
signalfd4 sigpending sigprocmask sigreturn sigsuspend splice stat stat64 statfs statfs64 statmount statx symlink
symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun
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

FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET)
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)
_NEW_NAMESPACES = 0x7E020000
_NEW_TIME_NAMESPACE = 0x80
_RLIMIT_CORE = 4
_LOW = 0xFFFFFFFF

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
    table += [Rule(("personality",), None, (_equal(0, value),)) for value in _PERSONALITIES]
    return [*table, *_sockets(), *_core_limit()]


def _equal(index: int, value: int) -> Argument:
    return Argument(index, "SCMP_CMP_EQ", value)


def _without_flags(name: str, flags: int) -> Iterator[Rule]:
    """Allow a call whose first argument has none of the flags, refuse it with any one of them."""
    yield Rule((name,), None, (Argument(0, "SCMP_CMP_MASKED_EQ", flags, 0),))
    for bit in (1 << n for n in range(32) if flags >> n & 1):
        yield Rule((name,), errno.EPERM, (Argument(0, "SCMP_CMP_MASKED_EQ", bit, bit),))


def _sockets() -> Iterator[Rule]:
    """Only the usual families: others (VSOCK, ALG, TIPC ...) lead to the hypervisor or load modules of the kernel."""
    for name in ("socket", "socketpair"):
        for family in range(max(FAMILIES) + 1):
            error = None if family in FAMILIES else errno.EAFNOSUPPORT
            yield Rule((name,), error, (_equal(0, family),))
        yield Rule((name,), errno.EAFNOSUPPORT, (Argument(0, "SCMP_CMP_GT", max(FAMILIES)),))


def _core_limit() -> Iterator[Rule]:
    """Setting RLIMIT_CORE succeeds without effect.

    A limit of exactly 1 keeps the kernel from starting the host's core handler; 0, which sudo sets, would not.
    """
    for name, index in (("setrlimit", 0), ("prlimit64", 1)):
        for resource in (n for n in range(16) if n != _RLIMIT_CORE):
            yield Rule((name,), None, (_equal(index, resource),))
    core = Argument(1, "SCMP_CMP_MASKED_EQ", _LOW, _RLIMIT_CORE)
    yield Rule(("setrlimit",), 0, (Argument(0, "SCMP_CMP_MASKED_EQ", _LOW, _RLIMIT_CORE),))
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
