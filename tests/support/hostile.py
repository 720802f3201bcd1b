#!/usr/bin/python3
"""A first process that takes the agent's place in a box and lies. Runs inside the box with the standard library alone.

Whoever puts it there appends a line `main("<mode>")`. It speaks properly but for what the mode does: a function of
that name, which replaces the handler named before the underscore (`spawn_...` answers SPAWN, and so on).
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import os
import pty
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

HELLO, SPAWN, SIGNAL, STDIN, READ, WRITE, RENAME, UNLINK, LIST, ACK, END, ROOM = 1, 2, 3, 4, 5, 6, 7, 8, 14, 15, 16, 17
OK, ERROR, FD, ENTRY, EXIT, STALL = 128, 129, 130, 131, 132, 133
NAMES = {
    HELLO: "hello", SPAWN: "spawn", SIGNAL: "signal", STDIN: "stdin", READ: "read", WRITE: "write", RENAME: "rename",
    UNLINK: "unlink", LIST: "list", ACK: "ack", END: "end", ROOM: "room",
}  # fmt: skip
FOREVER = 1 << 20
KEEP_SIZE, PUNCH_HOLE = 1, 2
GET_FLAGS, SET_FLAGS = 0x80086601, 0x40086602
MIB = 1 << 20
kept: list[object] = []
"""What must stay open."""


def text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def texts(body: bytes) -> list[bytes]:
    """The texts at the beginning of a request."""
    found = []
    while len(body) >= 4 and (length := struct.unpack_from("<I", body)[0]) <= len(body) - 4 and length:
        found.append(body[4 : 4 + length])
        body = body[4 + length :]
    return found


class Request:
    """One request: who asked, its tag, its fields, its descriptors."""

    def __init__(self, peer: socket.socket, data: bytes, fds: list[int]) -> None:
        self.peer = peer
        self.verb, self.tag = struct.unpack_from("<II", data)
        self.body = data[8:]
        self.fds = fds
        names = texts(self.body)
        self.key = names[0] if names else b""
        self.path = names[1] if len(names) > 1 else b""

    def say(self, frame: bytes, *fds: int) -> None:
        self.peer.sendmsg([frame], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])

    def ok(self, value: int = 0, *fds: int) -> None:
        self.say(struct.pack("<IIQ", OK, self.tag, value), *fds)

    def fd(self, fd: int, kind: int = 0, temporary: bytes = b"", target: bytes = b"") -> None:
        self.say(struct.pack("<IIQ", FD, self.tag, kind) + text(temporary) + text(target), fd)

    def error(self, stage: int = 10, number: int = 2, name: bytes = b"ENOENT") -> None:
        self.say(struct.pack("<IIII", ERROR, self.tag, stage, number) + text(name))

    def exit(self, key: bytes | None = None, status: int = 0, out: int = 0, err: int = 0, flags: int = 0) -> None:
        body = struct.pack("<IIQQI", 0, status, out, err, flags)
        self.say(struct.pack("<II", EXIT, 0) + text(self.key if key is None else key) + body)

    def entry(self, key: bytes, state: int = 1, tag: int | None = None) -> None:
        body = struct.pack("<IIQQQQ", 0, state, 7, 0, 0, 0) + text(b"")
        self.say(struct.pack("<II", ENTRY, self.tag if tag is None else tag) + text(key) + body)

    def stall(self, key: bytes, number: int) -> None:
        self.say(struct.pack("<II", STALL, 0) + text(key) + struct.pack("<I", number))

    def command(self) -> str:
        """The command's text: the script, which is the last of the texts in the record, without its mark."""
        record = os.pread(self.fds[0], MIB, 0)
        at, last = 0, b""
        for texts in (None, None, 3):  # arguments, environment; directory, user and script
            if texts is None:
                (texts,), at = struct.unpack_from("<I", record, at), at + 4
            for _ in range(texts):
                (length,), at = struct.unpack_from("<I", record, at), at + 4
                last, at = record[at : at + length], at + length
        return last.decode().removeprefix("__devboxd=;")


def numbers() -> Iterator[bytes]:
    return (b"k%d" % number for number in itertools.count())


def silent(request: Request) -> None:
    kept.append(request)


# -- proper answers --


def hello(request: Request) -> None:
    request.ok(1)


def proper(request: Request) -> None:
    request.ok()


def room(request: Request) -> None:
    request.ok(1000)


def spawn(request: Request) -> None:
    request.ok(7)
    kept.append(request)


def read(request: Request) -> None:
    request.error()


def write(request: Request) -> None:
    name = b"/tmp/written"
    fd = os.open(name, os.O_WRONLY | os.O_CREAT)
    request.fd(fd, 0, name + b".new", name)
    os.close(fd)


# -- what is no frame --


def spawn_noise(request: Request) -> None:
    request.say(b"\xff" * 50)


def spawn_long_frame(request: Request) -> None:
    request.say(struct.pack("<II", OK, request.tag) + bytes(20_000))


def spawn_cut_frame(request: Request) -> None:
    request.say(struct.pack("<IIQ", OK, request.tag, 7)[:-1])


def spawn_empty_frame(request: Request) -> None:
    """What looks like the end of the connection."""
    os.write(request.fds[1], b"x")
    request.say(b"")


def spawn_unknown_verb(request: Request) -> None:
    request.say(struct.pack("<IIQ", 99, request.tag, 0))


def spawn_impossible_length(request: Request) -> None:
    request.say(struct.pack("<IIII", ERROR, request.tag, 10, 2) + struct.pack("<I", 0xFFFFFFFF) + b"ENOENT")


def spawn_impossible_status(request: Request) -> None:
    request.ok(7)
    request.exit(status=256)


# -- answers to nothing --


def spawn_unknown_tag(request: Request) -> None:
    request.say(struct.pack("<IIQ", OK, 4_000_000_000, 7))


def spawn_answered_twice(request: Request) -> None:
    request.ok(7)
    request.ok(7)


def spawn_answered_with_a_descriptor(request: Request) -> None:
    request.fd(request.fds[1])


def spawn_entries_that_nobody_asked_for(request: Request) -> None:
    for key in numbers():
        request.entry(key)


def read_without_a_descriptor(request: Request) -> None:
    request.ok()


# -- descriptors --


def spawn_five_descriptors(request: Request) -> None:
    request.ok(7, *[request.fds[1]] * 5)


def spawn_all_descriptors_that_fit(request: Request) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    request.ok(7, *[null] * 253)
    os.close(null)


def lingering() -> int:
    """A TCP socket whose last close waits for an hour: it has sent what nobody reads."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        kept.append(server.accept()[0])
    one.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            one.send(bytes(65536))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    return one.detach()


def spawn_lingering_sockets(request: Request) -> None:
    fds = [lingering() for _ in range(12)]
    request.ok(7, *fds)
    for fd in fds:
        os.close(fd)


def spawn_lingering_sockets_that_nobody_reads(request: Request) -> None:
    request.say(b"\xff")
    for _ in range(12):
        fd = lingering()
        request.ok(7, fd)
        os.close(fd)


def read_whatever(request: Request) -> None:
    """The path says what is handed over instead of a file."""
    fd = made(request.path.decode())
    request.fd(fd)
    os.close(fd)


def made(what: str) -> int:
    if what == "fifo":
        if not os.path.exists("/tmp/fifo"):
            os.mkfifo("/tmp/fifo")
        return os.open("/tmp/fifo", os.O_RDWR)
    if what == "terminal":
        master, slave = pty.openpty()
        kept.append(slave)
        return master
    if what == "epoll":
        with select.epoll() as poll:
            return os.dup(poll.fileno())
    if what == "lingering":
        return lingering()
    if what == "unopened":
        return os.open("/etc/passwd", os.O_PATH)
    if what == "write-only":
        return os.open("/tmp/write-only", os.O_WRONLY | os.O_CREAT)
    if what.startswith("socket"):
        _, family, kind = what.split("-")
        return socket.socket(int(family), int(kind)).detach()
    return os.open(what, os.O_RDONLY)


def read_slippery(request: Request) -> None:
    """A file that becomes smaller in the middle, when a command is started."""
    with open("/tmp/slippery", "wb") as file:
        file.truncate(256 * MIB)
    fd = os.open("/tmp/slippery", os.O_RDONLY)
    request.fd(fd)
    os.close(fd)


def spawn_shrinks(request: Request) -> None:
    os.truncate("/tmp/slippery", MIB)
    request.ok(7)


def read_endless_pipe(request: Request) -> None:
    ours, theirs = os.pipe()
    request.fd(ours, 1)
    os.close(ours)

    def fill() -> None:
        try:
            while True:
                os.write(theirs, bytes(65536))
        except BrokenPipeError:
            os.close(theirs)

    threading.Thread(target=fill).start()


def read_dumb_pipe(request: Request) -> None:
    ours, theirs = os.pipe()
    request.fd(ours, 1)
    os.close(ours)
    kept.append(theirs)


def write_full_pipe(request: Request) -> None:
    theirs, ours = os.pipe()
    request.fd(ours, 1)
    os.close(ours)
    kept.append(theirs)


# -- ends --


def spawn_end_of_nothing(request: Request) -> None:
    request.ok(7)
    request.exit(b"exe_none")


def spawn_end_of_another_box(request: Request) -> None:
    request.ok(7)
    request.exit(request.command().encode(), status=66)


def spawn_end_told_twice(request: Request) -> None:
    request.ok(7)
    request.exit(status=3)
    request.exit(status=4)


def ack_end_told_again(request: Request) -> None:
    request.ok()
    request.exit(status=5)


def spawn_end_at_once(request: Request) -> None:
    request.ok(7)
    request.exit(status=3)


def spawn_end_before_the_start(request: Request) -> None:
    request.exit(status=3)
    request.ok(7)


def spawn_lengths(request: Request) -> None:
    """The command says what length is claimed of five bytes."""
    request.ok(7)
    os.write(request.fds[1], b"12345")
    request.exit(out=int(request.command()), err=2**64 - 1)


# -- floods --


def spawn_flood_of_stalls(request: Request) -> None:
    request.ok(7)
    kept.append(request)
    for key in numbers():
        request.stall(key, 28)
        request.stall(key, 0)


def hello_flood_of_ends(request: Request) -> None:
    request.ok(1)
    for key in numbers():
        request.exit(key)


def list_without_end(request: Request) -> None:
    for key in numbers():
        request.entry(key)


def list_of_a_huge_count(request: Request) -> None:
    request.entry(b"one")
    request.ok(2**63)


def list_that_starts_for_ever(request: Request) -> None:
    request.entry(b"one", state=0)
    request.ok(1)


def hello_of_another_generation(request: Request) -> None:
    request.ok(7)


# -- journals --


def spawn_past_the_cap(request: Request) -> None:
    request.ok(7)
    for _ in range(16):
        os.write(request.fds[1], bytes(MIB))
    kept.append(request)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    import ctypes

    call = ctypes.CDLL(None, use_errno=True).fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if call(fd, mode, offset, length):
        raise OSError(ctypes.get_errno(), "fallocate")


def spawn_behind_the_end(request: Request) -> None:
    request.ok(7)
    os.write(request.fds[2], b"short")
    fallocate(request.fds[2], KEEP_SIZE, 0, 64 * MIB)
    kept.append(request)


def attempts(fd: int) -> dict[str, object]:
    """All ways to change what a journal holds already."""
    path = f"/proc/self/fd/{fd}"
    return {
        "truncate": lambda: os.ftruncate(fd, 0),
        "truncate by path": lambda: os.truncate(path, 0),
        "open anew": lambda: os.open(path, os.O_WRONLY),
        "open to read": lambda: os.open(path, os.O_RDONLY),
        "open and truncate": lambda: os.open(path, os.O_WRONLY | os.O_APPEND | os.O_TRUNC),
        "append no more": lambda: fcntl.fcntl(fd, fcntl.F_SETFL, 0),
        "clear the flag": lambda: fcntl.ioctl(fd, SET_FLAGS, struct.pack("<q", 0)),
        "punch a hole": lambda: fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 0, 4),
        "change the mode": lambda: os.fchmod(fd, 0o666),
        "change the owner": lambda: os.fchown(fd, 0, 0),
    }


def spawn_rewrites(request: Request) -> None:
    request.ok(7)
    fd = request.fds[1]
    os.write(fd, b"before\n")
    for name, attempt in attempts(fd).items():
        try:
            attempt()  # type: ignore[operator]
            os.write(fd, f"{name}: done\n".encode())
        except OSError as error:
            os.write(fd, f"{name}: {error.strerror}\n".encode())
    os.pwrite(fd, b"after\n", 0)
    request.exit(out=FOREVER)


def spawn_goes_on_after_the_end(request: Request) -> None:
    """What earlier commands have left open is written to at each new one."""
    request.ok(7)
    for earlier in kept:
        os.write(earlier.fds[1], b"later\n")  # type: ignore[attr-defined]
    os.write(request.fds[1], b"in time\n")
    request.exit(out=8)
    kept.append(request)


# -- the rest --


def stdin_far_ahead(request: Request) -> None:
    request.ok(2**63)


HANDLERS = {
    "hello": hello, "list": proper, "spawn": spawn, "signal": proper, "stdin": proper, "read": read, "write": write,
    "rename": proper, "unlink": proper, "ack": proper, "end": proper, "room": room,
}  # fmt: skip


def talk(peer: socket.socket) -> None:
    while True:
        data, fds, _, _ = socket.recv_fds(peer, 20_000, 8)
        if not data:
            return
        request = Request(peer, data, list(fds))
        handler = HANDLERS.get(NAMES.get(request.verb, ""), proper)
        threading.Thread(target=carry_out, args=(handler, request)).start()


def carry_out(handler: object, request: Request) -> None:
    with contextlib.suppress(OSError):  # the server has ended the connection
        handler(request)  # type: ignore[operator]


def main(modes: str) -> None:
    """Serve for ever. Modes apart by blanks replace handlers; `silent_spawn` and the like answer nothing."""
    with socket.socket(fileno=3) as listener:
        for mode in modes.split():
            first, _, rest = mode.partition("_")
            if mode == "deaf":
                listener.close()
                time.sleep(FOREVER)
            elif first == "silent":
                HANDLERS[rest] = silent
            else:
                HANDLERS[first] = globals()[mode]
        while True:
            peer, _ = listener.accept()
            threading.Thread(target=follow, args=(peer,)).start()


def follow(peer: socket.socket) -> None:
    with peer, contextlib.suppress(OSError):
        talk(peer)
