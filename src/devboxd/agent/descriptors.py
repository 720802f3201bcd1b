"""Checks of descriptors that come out of a box: whoever sent them is hostile, so each must prove what it is."""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import stat
import struct
from typing import Final

XFS: Final = 0x58465342
_OVERLAYFS, _TMPFS, _EXT4, _BTRFS = 0x794C7630, 0x01021994, 0xEF53, 0x9123683E
_DISKS: Final = frozenset({_OVERLAYFS, _TMPFS, _EXT4, _BTRFS, XFS})
_PIPEFS: Final = 0x50495045
_PTMX: Final = os.makedev(5, 2)
_STATFS_BYTES: Final = 512  # more than any architecture's struct statfs
_libc = ctypes.CDLL(None, use_errno=True)


class DescriptorError(Exception):
    """A descriptor is not of the kind that was asked for; the text says what it should have been."""


def filesystem_type(fd: int) -> int:
    """Return f_type of the file system under an open descriptor; raise OSError."""
    buffer = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    (kind,) = struct.unpack_from("@l", buffer)
    return int(kind) & 0xFFFFFFFF


def check_file(fd: int, *, writing: bool) -> None:
    """Accept a regular file on a disk's file system, open in this direction, alone.

    Files of procfs and its like judge whoever reads them.
    """
    wanted = os.O_WRONLY if writing else os.O_RDONLY
    if not stat.S_ISREG(os.fstat(fd).st_mode) or filesystem_type(fd) not in _DISKS:
        raise DescriptorError("a regular file on a disk")
    if fcntl.fcntl(fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_PATH | os.O_DIRECT) not in (wanted, os.O_RDWR):
        raise DescriptorError("a file that is open for what was asked")


def close(fd: int) -> None:
    """Close a descriptor of a box. Only for threads that nobody waits for: some wait at their close for the box."""
    _libc.setsockopt(fd, socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0), 8)  # no socket: no harm
    with contextlib.suppress(OSError):
        os.close(fd)


def reopen_pipe(fd: int, *, writing: bool) -> int:
    """Return a new non-blocking descriptor of an anonymous pipe: O_NONBLOCK of the old one is shared with the box."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode) or filesystem_type(fd) != _PIPEFS:
        raise DescriptorError("a pipe")
    direction = os.O_WRONLY if writing else os.O_RDONLY
    return os.open(f"/proc/self/fd/{fd}", direction | os.O_NONBLOCK | os.O_CLOEXEC)


def take_socket(fd: int) -> socket.socket:
    """Make a socket object of a TCP socket, with no lingering at its close, non-blocking. Owns fd when it returns."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise DescriptorError("a TCP socket")
    connection = socket.socket(fileno=fd)
    try:
        tcp = connection.proto == socket.IPPROTO_TCP and connection.type == socket.SOCK_STREAM
        if not tcp or connection.family not in (socket.AF_INET, socket.AF_INET6):
            raise DescriptorError("a TCP socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))
        connection.setblocking(False)
        connection.getpeername()
    except BaseException:
        connection.detach()
        raise
    return connection


def check_terminal(fd: int) -> None:
    """Accept the master of a pseudo-terminal alone."""
    status = os.fstat(fd)
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != _PTMX:
        raise DescriptorError("a terminal")


def error_number(error: DescriptorError | OSError) -> int:
    """Return the errno that a refused descriptor is reported with."""
    return (error.errno or errno.EINVAL) if isinstance(error, OSError) else errno.EINVAL
