"""The socket between the server and an agent: connecting, and messages with the descriptors that come along."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from devboxd.agent import protocol
from devboxd.agent.protocol import ProtocolError

_CONTROL_BYTES: Final = socket.CMSG_SPACE(253 * 4)
"""Room for as many descriptors as a message can carry: those without room the kernel would close here and now."""


def connect(path: str | Path) -> socket.socket:
    """Connect without blocking; a socket's path of any length is reached through a descriptor."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.setblocking(False)
        location = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            connection.connect(f"/proc/self/fd/{location}")
        finally:
            os.close(location)
    except BlockingIOError as error:
        connection.close()
        raise ConnectionRefusedError(f"cannot connect to the agent at {path}: it accepts nobody") from error
    except BaseException:
        connection.close()
        raise
    return connection


def receive(connection: socket.socket, fds: list[int]) -> bytes:
    """Take one message and add its descriptors, which the caller then owns, to `fds`, also when this raises.

    Raises ProtocolError for a frame that is too long, OSError as recvmsg does, at the end of the connection, and when
    a descriptor found no place here.
    """
    data, control, flags, _ = connection.recvmsg(protocol.FRAME_MAX + 1, _CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC)
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4]))
    if not data:
        raise ConnectionResetError("it closed the connection")
    if flags & socket.MSG_TRUNC:
        raise ProtocolError("it sent a frame that is too long")
    if flags & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, "the server has too many open files")
    return data


@contextlib.contextmanager
def memory(name: str, content: bytes) -> Iterator[int]:
    """A descriptor of an anonymous file with this content."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        yield fd
    finally:
        os.close(fd)
