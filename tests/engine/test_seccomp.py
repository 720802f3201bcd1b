"""The table of system calls, and the program that is made of it."""

from __future__ import annotations

import errno
import platform
import struct
from collections import defaultdict

import pytest

from devboxd.engine import seccomp


@pytest.mark.parametrize("nested", [False, True])
def test_each_call_has_one_rule_or_rules_with_conditions(nested: bool) -> None:
    found: dict[str, list[seccomp.Rule]] = defaultdict(list)
    for rule in seccomp.rules(nested):
        for name in rule.names:
            found[name].append(rule)
    double = {name for name, rules in found.items() if len(rules) > 1 and not all(rule.arguments for rule in rules)}
    assert double == set()


def test_nothing_is_allowed_and_refused() -> None:
    lists = [seccomp.ALLOWED, seccomp.REFUSED, seccomp.NAMESPACES]
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_program_is_for_the_kernel() -> None:
    plain, nested = (seccomp.compile_filter(seccomp.rules(flag)) for flag in (False, True))
    assert len(plain) % 8 == 0
    assert 100 < len(plain) // 8 < 4096
    assert plain != nested


def test_both_forms_come_from_one_table() -> None:
    table = seccomp.rules(nested_user_namespaces=False)
    form = seccomp.oci(table)
    assert form["defaultErrnoRet"] == errno.ENOSYS
    assert len(form["syscalls"]) == len(table)
    assert {"names": ["sync"], "action": "SCMP_ACT_ERRNO", "errnoRet": 0} in form["syscalls"]
    forms = {seccomp.compile_filter(table), seccomp.compile_filter(seccomp.rules(nested_user_namespaces=False))}
    assert len(forms) == 1


UNIX, INET, INET6, NETLINK, PACKET = 1, 2, 10, 16, 17
STREAM, DGRAM, RAW, SEQPACKET, DCCP, SOCK_PACKET = 1, 2, 3, 5, 6, 10
CLOEXEC, NONBLOCK = 0x80000, 0x800
GARBAGE = 0xDEAD << 32
"""In the upper half of a register, at which the kernel does not look for an argument of 32 bits."""
MINUS_ONE = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("call", "arguments", "expected"),
    [
        ("socket", (UNIX, SEQPACKET | CLOEXEC, 0), 0),
        ("socket", (INET, STREAM | CLOEXEC | NONBLOCK, 0), 0),
        ("socket", (INET6, STREAM, 6), 0),
        ("socket", (INET, DGRAM, 1), 0),  # ping
        ("socket", (INET6, DGRAM, 58), 0),
        ("socket", (GARBAGE | INET, GARBAGE | DGRAM, GARBAGE | 17), 0),
        ("socket", (NETLINK, RAW | CLOEXEC, 0), 0),
        ("socket", (NETLINK, DGRAM, 4), 0),
        ("socket", (INET, STREAM, 262), errno.EPROTONOSUPPORT),  # MPTCP
        ("socket", (INET, DGRAM, 136), errno.EPROTONOSUPPORT),  # UDPLITE
        ("socket", (INET, DGRAM, 115), errno.EPROTONOSUPPORT),  # L2TP
        ("socket", (INET, STREAM, 132), errno.EPROTONOSUPPORT),  # SCTP
        ("socket", (INET6, SEQPACKET, 132), errno.ESOCKTNOSUPPORT),
        ("socket", (INET, DCCP, 0), errno.ESOCKTNOSUPPORT),
        ("socket", (INET, RAW, 1), errno.EPERM),
        ("socket", (INET, SOCK_PACKET | CLOEXEC, 768), errno.EPERM),
        ("socket", (GARBAGE | INET, GARBAGE | SOCK_PACKET, 768), errno.EPERM),
        ("socket", (PACKET, RAW, 768), errno.EPERM),
        ("socket", (NETLINK, RAW, 2), errno.EPROTONOSUPPORT),  # USERSOCK: any user sends to any other
        ("socket", (NETLINK, RAW, 9), errno.EPROTONOSUPPORT),  # AUDIT: as in a kernel without it
        ("socket", (NETLINK, RAW, 12), errno.EPROTONOSUPPORT),  # NETFILTER
        ("socket", (NETLINK, RAW, 16), errno.EPROTONOSUPPORT),  # GENERIC
        ("socket", (40, STREAM, 0), errno.EAFNOSUPPORT),
        ("socket", (GARBAGE | 38, SEQPACKET, 0), errno.EAFNOSUPPORT),
        ("socketpair", (UNIX, STREAM, 0), 0),
        ("socketpair", (INET, SEQPACKET, 132), errno.EOPNOTSUPP),  # or the kernel would load SCTP to say so
        ("socketpair", (30, STREAM, 0), errno.EAFNOSUPPORT),
        ("setsockopt", (3, 1, 2), 0),
        ("setsockopt", (3, 6, 26), 0),
        ("setsockopt", (3, 0, 51), 0),
        ("setsockopt", (3, 65535, 4), 0),  # the kernel has the right words for a level that it does not know
        ("setsockopt", (3, 1, 26), errno.EPERM),
        ("setsockopt", (3, GARBAGE | 1, GARBAGE | 50), errno.EPERM),
        ("setsockopt", (3, 1, 51), errno.EPERM),
        ("setsockopt", (3, 1, 52), errno.EPERM),
        ("ioctl", (0, 0x5401), 0),
        ("ioctl", (0, 0x541B), 0),
        ("ioctl", (0, 0xC0045405), 0),
        ("ioctl", (0, 0x5412), errno.EPERM),
        ("ioctl", (0, GARBAGE | 0x541C), errno.EPERM),
        ("ioctl", (0, 0x5423), errno.EPERM),
        ("personality", (MINUS_ONE,), 0),
        ("personality", (0x40000,), 0),  # setarch -R, gdb
        ("personality", (0x40008,), 0),
        ("personality", (0x400000,), errno.ENOSYS),  # READ_IMPLIES_EXEC
        ("personality", (0x100000,), errno.ENOSYS),  # MMAP_PAGE_ZERO
        ("personality", (GARBAGE,), errno.ENOSYS),
        ("io_setup", (1, 0), errno.ENOSYS),
        ("syncfs", (3,), 0),
        ("fsync", (3,), 0),
        ("fdatasync", (3,), 0),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_a_call_answers(call: str, arguments: tuple[int, ...], expected: int, nested: bool) -> None:
    answer = answer_of(seccomp.compile_filter(seccomp.rules(nested)), call, arguments)
    assert answer == (ALLOW if expected == 0 else ERRNO | expected)


@pytest.mark.parametrize("call", ["chown", "lchown", "fchown", "fchownat"])
def test_owners_that_no_process_can_have_are_not_set(call: str) -> None:
    program = seccomp.compile_filter(seccomp.rules(nested_user_namespaces=False))
    before = (3, 4) if call == "fchownat" else (3,)
    for uid in (0, 1000, 65535, MINUS_ONE, GARBAGE | 7, 0xFFFFFFFFFFFFFFFF):
        for gid in (0, 65535, MINUS_ONE):
            assert answer_of(program, call, (*before, uid, gid)) == ALLOW
            assert answer_of(program, call, (*before, gid, uid)) == ALLOW
        for large in (
            65536,
            197609,
            1 << 31,
            0xFFFE0001,
            MINUS_ONE - 1,
            GARBAGE | 501 << 16,
            *(1 << n for n in range(16, 32)),
        ):
            assert answer_of(program, call, (*before, uid, large)) == ERRNO
            assert answer_of(program, call, (*before, large, uid)) == ERRNO


ALLOW, ERRNO = 0x7FFF0000, 0x00050000
_JUMPS = {0x15: int.__eq__, 0x25: int.__gt__, 0x35: int.__ge__, 0x45: lambda a, b: bool(a & b)}


def answer_of(program: bytes, call: str, arguments: tuple[int, ...]) -> int:
    """What the kernel would make of a call: the program is run here."""
    number = seccomp._library().seccomp_syscall_resolve_name(call.encode())
    architecture = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[platform.machine()]
    filled = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.pack("=iIQ6Q", number, architecture, 0, *filled)
    position = value = 0
    while True:
        code, yes, no, k = struct.unpack_from("=HBBI", program, 8 * position)
        position += 1
        if code == 0x06:  # return
            return int(k)
        if code == 0x20:  # load
            value = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:  # and
            value &= k
        elif code == 0x05:  # jump
            position += k
        else:
            position += yes if _JUMPS[code](value, k) else no
