"""The few Linux calls that Python 3.11 lacks, and small facts from /proc.

Calls that change the calling thread alone (namespace, file system ids) say so: they belong into a thread that ends
soon after, never into the event loop's.
"""

from __future__ import annotations

import array
import ctypes
import fcntl
import os
import re
import struct
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME, MS_BIND = 1, 2, 4, 8, 32, 1024, 4096
_MS_REC, _MS_SLAVE = 1 << 14, 1 << 19
_MNT_DETACH = 2
_CLONE_NEWNS, _CLONE_FS = 0x00020000, 0x00000200
_AT_EMPTY_PATH, _AT_FDCWD = 0x1000, -100
_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _FSPICK, _MOUNT_SETATTR = 428, 429, 430, 431, 432, 433, 442
_FSPICK_EMPTY_PATH = 8
_OPEN_TREE_CLONE, _MOVE_MOUNT_F_EMPTY_PATH = 1, 4
_SET_FLAG, _SET_STRING, _CMD_CREATE, _CMD_RECONFIGURE = 0, 1, 6, 7
_ATTR_NOSUID, _ATTR_NODEV, _ATTR_NOEXEC, _ATTR_NOATIME, _ATTR_IDMAP = 2, 4, 8, 16, 0x00100000
_FILE_SYSTEMS = Path("/proc/filesystems")
_OOM = Path("/proc/self/oom_score_adj")
_CAPABILITY_VERSION_3 = 0x20080522
_PIDFD_GET_INFO, _PIDFD_INFO_EXIT, _PIDFD_INFO_SIZE = 0xC040FF0B, 1 << 3, 64


def _check(result: int, what: str) -> int:
    """The result of a call of libc, or OSError that carries its errno and what was tried."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _call(number: int, what: str, *arguments: int | bytes) -> int:
    """A system call that libc has no name for; numbers above 424 are the same on every architecture."""
    converted = [ctypes.c_char_p(a) if isinstance(a, bytes) else ctypes.c_long(a) for a in arguments]
    return _check(_libc.syscall(ctypes.c_long(number), *converted), what)


def private_mounts() -> None:
    """Give the calling thread a mount namespace of its own, from which nothing reaches the host's."""
    _check(_libc.unshare(_CLONE_NEWNS), "unshare the mount namespace")
    mount("none", Path("/"), None, _MS_REC | _MS_SLAVE)


def enter_mounts(pid: int) -> None:
    """Have the calling thread in the mount namespace of a process, for ever. Raises OSError."""
    process = os.pidfd_open(pid)
    try:
        _check(_libc.unshare(_CLONE_FS), "leave the other threads")
        _check(_libc.setns(process, _CLONE_NEWNS), "enter a mount namespace")
    finally:
        os.close(process)


def protect(target: Path) -> None:
    """Make a mount read-only, and closed to programs, setuid and devices. Raises OSError."""
    mount("none", target, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)


def mount(source: str, target: Path | str, kind: str | None, flags: int = 0, data: str = "") -> None:
    """mount(2). A relative target or relative names in `data` start at the working directory."""
    name = kind.encode() if kind else None
    result = _libc.mount(os.fsencode(source), os.fsencode(target), name, ctypes.c_ulong(flags), data.encode() or None)
    _check(result, f"mount {kind or source} at {target}")


def bind(source: Path, target: Path, user_namespace: int | None = None) -> None:
    """Show a file or folder elsewhere, ids shifted by the map of the user namespace if one is given.

    Limits of the mount that `source` lies on (nosuid, nodev, noexec) do not carry over.
    """
    tree = clone(source)
    try:
        attach(tree, target, user_namespace)
    finally:
        os.close(tree)


def clone(source: Path) -> int:
    """A descriptor of a new mount of a file or folder: it lies nowhere until `attach`, and goes when it is closed."""
    return _call(_OPEN_TREE, f"clone {source}", _AT_FDCWD, os.fsencode(source), _OPEN_TREE_CLONE | os.O_CLOEXEC)


def file_system(kind: str, device: str, options: Iterable[str]) -> int:
    """A descriptor of a new mount of the file system on a device, as from `clone`; closed to programs and devices.

    Also where that file system is in use already: then the options do not count. Raises OSError.
    """
    what = f"mount {kind} from {device}"
    context = _call(_FSOPEN, what, kind.encode(), 1)
    try:
        _call(_FSCONFIG, what, context, _SET_STRING, b"source", os.fsencode(device), 0)
        for option in options:
            name, equals, value = option.partition("=")
            command, given = (_SET_STRING, value.encode()) if equals else (_SET_FLAG, 0)
            _call(_FSCONFIG, f"{what} with {option}", context, command, name.encode(), given, 0)
        _call(_FSCONFIG, what, context, _CMD_CREATE, 0, 0, 0)
        return _call(_FSMOUNT, what, context, 1, _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC | _ATTR_NOATIME)
    finally:
        os.close(context)


def reconfigure(tree: int, option: str) -> None:
    """Set an option of the file system of a mount, for all of its mounts. Raises OSError."""
    what = f"mount anew with {option}"
    context = _call(_FSPICK, what, tree, b"", _FSPICK_EMPTY_PATH | 1)
    try:
        _call(_FSCONFIG, what, context, _SET_FLAG, option.encode(), 0, 0)
        _call(_FSCONFIG, what, context, _CMD_RECONFIGURE, 0, 0, 0)
    finally:
        os.close(context)


def attach(tree: int, target: Path, user_namespace: int | None = None) -> None:
    """Put a new mount at its place, open to programs and devices, ids shifted as by `bind`."""
    cleared = _ATTR_NOSUID | _ATTR_NODEV | _ATTR_NOEXEC
    mapped = (0, cleared, 0, 0) if user_namespace is None else (_ATTR_IDMAP, cleared, 0, user_namespace)
    attributes = struct.pack("=4Q", *mapped)
    _call(_MOUNT_SETATTR, f"map the ids for {target}", tree, b"", _AT_EMPTY_PATH, attributes, len(attributes))
    settle(tree, target)


def settle(tree: int, target: Path) -> None:
    """Put a new mount at its place as it is."""
    what = f"attach a mount at {target}"
    _call(_MOVE_MOUNT, what, tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)


def file_system_kind(descriptor: int) -> int:
    """The kernel's number of the kind of file system on which an open file lies (see statfs(2)). Raises OSError."""
    found = (ctypes.c_long * 32)()
    _check(_libc.fstatfs(descriptor, ctypes.byref(found)), "fstatfs")
    return int(found[0])


def has_file_system(kind: str) -> bool:
    """Whether the kernel knows a kind of file system, once it has been asked to load it."""
    if kind not in _FILE_SYSTEMS.read_text().split():
        with suppress(OSError):
            subprocess.run(("modprobe", "--quiet", kind), stderr=subprocess.DEVNULL, check=False)
    return kind in _FILE_SYSTEMS.read_text().split()


def allocate(descriptor: int, size: int) -> None:
    """Give each byte of a file a block on the disk, up to this size; what is written stays. Raises OSError.

    Unlike `os.posix_fallocate` it never writes where the file system cannot do that.
    """
    length = ctypes.c_int64(size)
    _check(_libc.fallocate64(descriptor, 0, ctypes.c_int64(0), length), "allocate the blocks of a file")


def ioctl(descriptor: int, request: int, argument: bytearray) -> None:
    """What `fcntl.ioctl` does, which stops all threads while it waits when the argument is larger than 1024 bytes.

    Raises OSError.
    """
    buffer = (ctypes.c_char * len(argument)).from_buffer(argument)
    _check(_libc.ioctl(descriptor, ctypes.c_ulong(request), buffer), "ioctl")


def write_back(descriptor: int) -> None:
    """Return when all is on the disk that was written to the file system of an opened file. Raises OSError."""
    _check(_libc.syncfs(descriptor), "write a file system back")


def unmount(target: Path) -> None:
    """Detach a mount at once, with everything mounted below it; the last user lets it go."""
    _check(_libc.umount2(os.fsencode(target), _MNT_DETACH), f"unmount {target}")


def mount_points() -> list[str]:
    """All mount points of this namespace, in the order of their making."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), line.split(" ")[4]) for line in lines]


@contextmanager
def file_system_ids(uid: int) -> Iterator[None]:
    """The calling thread meets file systems as this uid and gid, and keeps all its capabilities meanwhile."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    held = ctypes.create_string_buffer(24)
    _check(_libc.capget(header, held), "read the own capabilities")
    _libc.setfsgid(uid)
    _libc.setfsuid(uid)
    try:
        _check(_libc.capset(header, held), "keep the own capabilities")
        yield
    finally:
        _libc.setfsuid(os.geteuid())
        _libc.setfsgid(os.getegid())


def start_time(pid: int) -> int | None:
    """When a process began, in clock ticks since boot; None when it has ended (a zombie has ended)."""
    fields = _stat(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on; none when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()


def boot_id() -> str:
    """Names this run of the machine: a pid of another one means nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def exit_status(pid: int, pidfd: int) -> int | None:
    """How an ended process ended, as a shell shows it.

    A zombie's /proc entry tells; after its parent took note only the pidfd does, since Linux 6.14. None before that.
    """
    code = _reaped_code(pidfd)
    if code is None and (fields := _stat(pid)) and fields[0] in "ZX":
        code = int(fields[49])
    if code is None:
        code = _reaped_code(pidfd)
    if code is None:
        return None
    return 128 + (code & 0x7F) if code & 0x7F else code >> 8 & 0xFF


def _reaped_code(pidfd: int) -> int | None:
    answer = array.array("B", struct.pack("=Q", _PIDFD_INFO_EXIT).ljust(_PIDFD_INFO_SIZE, b"\0"))
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, answer)
    except OSError:
        return None
    mask: int = struct.unpack_from("=Q", answer)[0]
    code: int = struct.unpack_from("=i", answer, 60)[0]
    return code if mask & _PIDFD_INFO_EXIT else None


def spare_from_oom(adjustment: int) -> None:
    """Make the kernel choose this process late when memory runs out, as far as it is permitted."""
    with suppress(OSError):
        _OOM.write_text(str(adjustment))


def oom_adjustment() -> int:
    """How early the kernel chooses this process when memory runs out."""
    return int(_OOM.read_text())
