"""A conversation of `AgentClient` with an agent that says whatever some bytes tell it: for fuzzing, and for replays.

Whatever is said, no exception may escape, no descriptor may stay open, and every request must end with the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from typing import Any

from devboxd.agent import protocol
from devboxd.agent.client import AgentClient, AgentClosedError, AgentError, OpenedFile, OpenedTarget
from devboxd.agent.protocol import ProtocolError, Scope, Verb

STEPS_MAX = 60
FLOODS_MAX = 2
ENDS_S = 30.0
KEYS = ("one", "two", "exe_0000000000000000000000")
Task = asyncio.Task[Any]


class Bytes:
    """Takes numbers and pieces off the input; past its end there are zeros."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> bool:
        return self._at < len(self._data)

    def number(self, below: int) -> int:
        self._at += 1
        return (self._data[self._at - 1] if self._at <= len(self._data) else 0) % below

    def take(self, size: int) -> bytes:
        self._at += size
        return self._data[self._at - size : self._at]


class Conversation:
    """One client and the socket of its agent."""

    def __init__(self, source: Bytes) -> None:
        self._source = source
        self._tasks: list[Task] = []
        self._tags = [1]
        self._faults: list[dict[str, Any]] = []
        self._ours: list[int] = []
        self._floods = 0
        asyncio.get_running_loop().set_exception_handler(lambda _, context: self._faults.append(context))
        mine, self._peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        mine.setblocking(False)
        self._peer.setblocking(False)
        self._client = AgentClient(mine, lambda event: None, lambda key, number: None, lambda: None)
        self._client.generation = protocol.GENERATION

    async def run(self) -> None:
        """Do what the input says, then close the agent's side and see that everything ends."""
        steps = (
            self._ask,
            self._answer,
            self._answer,
            self._noise,
            self._cancel,
            self._listen,
            self._turn,
            self._flood,
        )
        for _ in range(STEPS_MAX):
            if not self._source.left():
                break
            step = steps[self._source.number(len(steps))]
            step()
            await asyncio.sleep(0)
        self._peer.close()
        _, open_tasks = await asyncio.wait(self._tasks, timeout=ENDS_S) if self._tasks else (None, None)
        assert not open_tasks, "a request does not end with its connection"
        for task in self._tasks:
            self._finish(task)
        await self._client.close()
        for fd in self._ours:
            os.close(fd)
        assert not self._faults, self._faults

    def _finish(self, task: Task) -> None:
        if task.cancelled():
            return
        error = task.exception()
        assert error is None or isinstance(error, (AgentError, AgentClosedError)), repr(error)
        match None if error else task.result():
            case OpenedFile() | OpenedTarget() as opened:
                os.close(opened.fd)
            case socket.socket() as connection:
                connection.close()
            case ("fd", fd):
                os.close(fd)

    def _ask(self) -> None:
        client, key = self._client, KEYS[self._source.number(len(KEYS))]
        null = os.open("/dev/null", os.O_RDWR)
        self._ours.append(null)

        async def terminal() -> tuple[str, int]:
            return "fd", await client.pty(key, 1, 1, b"record")

        requests = (
            lambda: client.spawn(key, b"record", null, null, None, 1),
            lambda: client.signal(key, 9, Scope.GROUP),
            lambda: client.stdin(key, 5, True),
            lambda: client.read("user", "path"),
            lambda: client.write("user", "path"),
            lambda: client.rename("user", "path", "target"),
            lambda: client.unlink("user", "path"),
            lambda: client.dial(80),
            terminal,
            lambda: client.resize(key, 1, 1),
            lambda: client.shell(key, b"record"),
            lambda: client.run("two", key, b"command", null, null, null, 1),
            client.list,
            lambda: client.ack(key),
        )
        self._tasks.append(asyncio.ensure_future(requests[self._source.number(len(requests))]()))

    def _listen(self) -> None:
        """Take what the client has sent, so that answers can carry the right tags."""
        with contextlib.suppress(OSError):
            while (message := socket.recv_fds(self._peer, protocol.FRAME_MAX, 8))[0]:
                self._tags.append(struct.unpack_from("<I", message[0], 4)[0])
                for fd in message[1]:
                    os.close(fd)

    def _answer(self) -> None:
        """A frame as the protocol has it, with fields from the input, perhaps cut or with a wrong byte."""
        self._listen()
        source = self._source
        tag = self._tags[-1 - source.number(min(4, len(self._tags)))]
        key = _text(KEYS[source.number(len(KEYS))].encode())
        number = struct.unpack("<Q", (source.take(source.number(9)) + bytes(8))[:8])[0]
        frames = (
            struct.pack("<IIQ", Verb.OK, tag, number),
            struct.pack("<IIII", Verb.ERROR, tag, 1 + source.number(16), 2) + _text(b"ENOENT"),
            struct.pack("<IIQ", Verb.FD, tag, 0) + _text(b"") * 2,
            struct.pack("<IIQ", Verb.FD, tag, 1) + _text(b"") * 2,
            struct.pack("<IIQ", Verb.FD, tag, 0) + _text(b"/temporary") + _text(b"/target"),
            struct.pack("<II", Verb.ENTRY, tag) + key + struct.pack("<IIQQQQ", 0, 1, 7, number, 0, 0) + _text(b""),
            struct.pack("<II", Verb.EXIT, 0) + key + struct.pack("<IIQQI", 0, 3, number, 0, 0),
            struct.pack("<II", Verb.STALL, 0) + key + struct.pack("<I", 28),
        )
        frame = bytearray(frames[source.number(len(frames))])
        if source.number(8) == 7:
            frame[source.number(len(frame))] = source.number(256)
        if source.number(16) == 15:
            del frame[source.number(len(frame)) :]
        usual = 1 if frame[:1] == bytes([Verb.FD]) else 0
        self._say(bytes(frame), usual if source.number(8) else source.number(6))

    def _noise(self) -> None:
        self._say(self._source.take(self._source.number(64)), self._source.number(6) if self._source.number(2) else 0)

    def _flood(self) -> None:
        """As many events as find room; few times, for they take long."""
        self._floods += 1
        frame = struct.pack("<II", Verb.STALL, 0) + _text(b"one") + bytes(4)
        with contextlib.suppress(OSError):
            while self._floods <= FLOODS_MAX:
                self._peer.send(frame)

    def _cancel(self) -> None:
        if self._tasks:
            self._tasks[self._source.number(len(self._tasks))].cancel()

    def _turn(self) -> None:
        """Nothing: the loop turns once more."""

    def _say(self, frame: bytes, count: int) -> None:
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            fds = [self._descriptor(stack) for _ in range(count)]
            socket.send_fds(self._peer, [frame], fds)

    def _descriptor(self, stack: contextlib.ExitStack) -> int:
        """Something that is handed over; our own copy ends with the message."""
        kind = self._source.number(8)
        if kind == 0:
            fd, other = os.pipe()
            stack.callback(os.close, other)
        elif kind == 1:
            other, fd = os.pipe()
            stack.callback(os.close, other)
        elif kind == 2:
            one, two = socket.socketpair()
            stack.callback(two.close)
            fd = one.detach()
        elif kind == 3:
            fd = socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
        else:
            path, flags = (
                ("/etc/passwd", os.O_RDONLY), ("/dev/null", os.O_RDWR), ("/etc", os.O_RDONLY), ("/dev/ptmx", os.O_RDWR),
            )[kind - 4]  # fmt: skip
            fd = os.open(path, flags | os.O_NOCTTY)
        stack.callback(os.close, fd)
        return fd


def _text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


async def _converse(source: Bytes) -> None:
    await Conversation(source).run()


def play(data: bytes) -> None:
    """What the input says: one frame for the decoder, or a whole conversation. Raises when something escapes."""
    if data[:1] == b"\0":
        with contextlib.suppress(ProtocolError):
            protocol.decode(data[2:], data[1] % 3 if data[1:] else 0)
        return
    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(_converse(Bytes(data[1:])))
    after = len(os.listdir("/proc/self/fd"))
    assert after == before, f"{after - before} descriptors stay open"
