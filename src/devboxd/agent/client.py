"""The asyncio client of `devboxd-init`: one connection to one box.

Requests may be outstanding side by side. What the agent sends is hostile: at most four descriptors are taken with a
message, each is checked for what it is, and anything off the protocol ends the connection.
"""

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from devboxd.agent import descriptors, protocol
from devboxd.agent.protocol import Entry, Error, Exit, ExitFlags, Fd, Message, Ok, ProtocolError, Scope, Stage, Stall

OUTSTANDING_MAX: Final = 1024
"""Requests that one connection has unanswered at most."""
ENTRIES_MAX: Final = 4096
"""Entries of one LIST that are believed."""
_HELLO_SECONDS: Final = 10.0
_FRAMES_A_TURN: Final = 64
_CONTROL_BYTES: Final = socket.CMSG_SPACE(protocol.FRAME_FDS * 4)


class AgentError(Exception):
    """The agent refused a request: where (stage), the Linux errno (0 if none) and words for people."""

    def __init__(self, stage: Stage, number: int) -> None:
        self.stage = stage
        self.errno = number
        self.name = os.strerror(number).lower() if number else "no reason was given"
        super().__init__(f"cannot {_STAGE_WORDS.get(stage, 'do this in the devbox')}: {self.name}")


class AgentClosedError(ConnectionError):
    """The connection ended before the answer came; whether the request was carried out is not known."""


_STAGE_WORDS = {
    Stage.LOOKUP: "find the execution in the devbox",
    Stage.DECODE: "make the devbox's agent understand the request",
    Stage.BUSY: "do this now, a limit of the devbox's agent is reached",
    Stage.FORK: "start a process in the devbox",
    Stage.USER: "become the user in the devbox",
    Stage.GROUPS: "take the user's groups in the devbox",
    Stage.DIRECTORY: "enter the directory in the devbox",
    Stage.EXEC: "execute the program in the devbox",
    Stage.STDIN: "send to stdin",
    Stage.OPEN: "open the file in the devbox",
    Stage.TYPE: "use the file in the devbox, it is not a regular file",
    Stage.PARENTS: "make the parent directories in the devbox",
    Stage.RENAME: "rename the file in the devbox",
    Stage.CONNECT: "connect to the port in the devbox",
    Stage.TERMINAL: "open a terminal in the devbox",
    Stage.DUPLICATE: "start it, the key is already in use in the devbox",
}


@dataclass(frozen=True)
class ExitEvent:
    """The end of an execution, terminal or shell; lengths in bytes at that moment.

    `status` is the exit code or 128 + signal; `shell_died` says that the named shell's own process ended.
    """

    key: str
    status: int
    signal: int | None
    stdout_length: int
    stderr_length: int
    stdout_truncated: bool
    stderr_truncated: bool
    shell_died: bool


@dataclass(frozen=True)
class OpenedFile:
    """A file opened for reading; with `pipe` it is a non-blocking pipe that a child of the agent fills. Owns fd."""

    fd: int
    pipe: bool


@dataclass(frozen=True)
class OpenedTarget:
    """A file opened for writing. Owns fd.

    Without `pipe`, fd is the file `temporary`, to be renamed to `target`; or, emptied, the file itself, where no other
    can take its place. With `pipe` it is a non-blocking pipe into the file itself. The paths are empty in these cases.
    """

    fd: int
    pipe: bool
    temporary: bytes
    target: bytes


@dataclass
class _Pending:
    """A request without its final answer; `undo` gets the answer when nobody waits for it any more."""

    future: asyncio.Future[tuple[Message, int]]
    entries: list[Entry] = field(default_factory=list)
    undo: Callable[[Fd], None] | None = None


def _milliseconds(seconds: float) -> int:
    return max(1, min(int(seconds * 1000), 600_000))


def _path(path: str | bytes) -> bytes:
    return os.fsencode(path)


def _connect(path: str | Path) -> socket.socket:
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


class AgentClient:
    """One connection to the agent of one box; made by `connect`."""

    generation: int = 0

    def __init__(
        self,
        connection: socket.socket,
        on_exit: Callable[[ExitEvent], None],
        on_stall: Callable[[str, int], None],
        on_closed: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._socket = connection
        self._on_exit = on_exit
        self._on_stall = on_stall
        self._on_closed = on_closed
        self._closed = False
        self._tag = 0
        self._pending: dict[int, _Pending] = {}
        self._outgoing: deque[tuple[int, bytes, Sequence[int]]] = deque()
        self._discards: set[asyncio.Future[None]] = set()
        self._loop.add_reader(connection, self._readable)

    @classmethod
    async def connect(
        cls,
        path: str | Path,
        *,
        on_exit: Callable[[ExitEvent], None],
        on_stall: Callable[[str, int], None],
        on_closed: Callable[[], None],
    ) -> Self:
        """Connect and agree on the generation; raise OSError, AgentError or AgentClosedError.

        The callbacks run in the event loop, also before this returns: exits that were not acknowledged come at once.
        `on_closed` is called once when the connection is lost later, not after `close`.
        """
        client = cls(_connect(path), on_exit, on_stall, on_closed)
        try:
            async with asyncio.timeout(_HELLO_SECONDS):
                client.generation = await client._value(protocol.encode_hello)
        except BaseException:
            await client.close()
            raise
        if client.generation != protocol.GENERATION:
            await client.close()
            raise ProtocolError(f"cannot speak generation {client.generation} of the agent's protocol")
        return client

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, by `close` or because it was lost."""
        return self._closed

    async def spawn(self, key: str, record: bytes, stdout: int, stderr: int, stdin: int | None, cap: int) -> int:
        """Start a command and return its pid in the box once exec succeeded. The descriptors are only borrowed."""
        with _memory("record", record) as memory:
            fds = [memory, stdout, stderr, *([] if stdin is None else [stdin])]
            return await self._value(lambda t: protocol.encode_spawn(t, key, stdin=stdin is not None, cap=cap), fds)

    async def signal(self, key: str, signal: int, scope: Scope) -> None:
        """Send a signal; AgentError(LOOKUP, ESRCH) when there is nobody."""
        await self._value(lambda tag: protocol.encode_signal(tag, key, signal, scope))

    async def end(self, key: str, scope: Scope, grace: float) -> None:
        """Send SIGTERM, and SIGKILL to whoever lives after the grace in seconds; the agent sees to it alone.

        AgentError(LOOKUP, ESRCH) when there is nobody.
        """
        await self._value(lambda tag: protocol.encode_end(tag, key, scope, _milliseconds(grace)))

    async def stdin(self, key: str, length: int, eof: bool) -> int:
        """Tell that the spool holds `length` bytes; return how many of them the command's pipe has taken."""
        return await self._value(lambda tag: protocol.encode_stdin(tag, key, length, eof=eof))

    async def read(self, user: str, path: str | bytes, deadline: float = 10.0) -> OpenedFile:
        """Open a file for reading as the user; deadline in seconds."""
        answer, fd = await self._fd(lambda tag: protocol.encode_read(tag, user, _path(path), _milliseconds(deadline)))
        return OpenedFile(self._accept(answer, fd, writing=False), bool(answer.kind))

    async def write(self, user: str, path: str | bytes, mode: int = 0o644, deadline: float = 10.0) -> OpenedTarget:
        """Open a file for writing as the user: see OpenedTarget. `mode` holds for a new file."""
        answer, fd = await self._fd(
            lambda tag: protocol.encode_write(tag, user, _path(path), mode, _milliseconds(deadline)),
            undo=lambda late: self._remove_late(user, late),
        )
        fd = self._accept(answer, fd, writing=True)
        return OpenedTarget(fd, bool(answer.kind), answer.temporary, answer.target)

    async def rename(self, user: str, source: str | bytes, target: str | bytes, deadline: float = 10.0) -> None:
        """Rename a file as the user."""
        names = _path(source), _path(target)
        await self._value(lambda tag: protocol.encode_rename(tag, user, *names, _milliseconds(deadline)))

    async def unlink(self, user: str, path: str | bytes, deadline: float = 10.0) -> None:
        """Remove a file as the user."""
        await self._value(lambda tag: protocol.encode_unlink(tag, user, _path(path), _milliseconds(deadline)))

    async def dial(self, port: int, deadline: float = 10.0) -> socket.socket:
        """Return a non-blocking TCP socket connected to a port of the box."""
        _, fd = await self._fd(lambda tag: protocol.encode_dial(tag, port, _milliseconds(deadline)))
        with self._refusing(fd, Stage.CONNECT):
            return descriptors.take_socket(fd)

    async def pty(self, key: str, rows: int, columns: int, record: bytes) -> int:
        """Start a command in a terminal, or find the living one of that key; return the master, which the caller owns.

        Its reads and writes block: they belong into a thread.
        """
        with _memory("record", record) as memory:
            _, fd = await self._fd(lambda tag: protocol.encode_pty(tag, key, rows, columns), [memory])
        with self._refusing(fd, Stage.TERMINAL):
            descriptors.check_terminal(fd)
            return fd

    async def resize(self, key: str, rows: int, columns: int) -> None:
        """Set a terminal's size in characters."""
        await self._value(lambda tag: protocol.encode_resize(tag, key, rows, columns))

    async def shell(self, key: str, record: bytes) -> int:
        """Start a shell (descriptors 20 and 21 are its commands and control pipes) and return its pid."""
        with _memory("record", record) as memory:
            return await self._value(lambda tag: protocol.encode_shell(tag, key), [memory])

    async def run(
        self, shell: str, key: str, command: bytes, stdout: int, stderr: int, stdin: int | None, cap: int
    ) -> None:
        """Run a command in a shell; returns when the shell was told. The descriptors are only borrowed."""
        with _memory("command", command) as memory:
            fds = [memory, stdout, stderr, *([] if stdin is None else [stdin])]
            attached = stdin is not None
            await self._value(lambda tag: protocol.encode_run(tag, shell, key, stdin=attached, cap=cap), fds)

    async def list(self) -> list[Entry]:
        """Return all that the agent knows and that was not acknowledged."""
        tag, pending = self._start(protocol.encode_list, ())
        message, fd = await self._wait(tag, pending)
        if not isinstance(message, Ok) or message.value != len(pending.entries):
            if fd >= 0:
                self._discard(fd)
            self._lose()
            raise ProtocolError("cannot use the agent's list: it is not as long as it says")
        return pending.entries

    async def ack(self, key: str) -> None:
        """Tell that an exit is stored: the agent forgets it."""
        await self._value(lambda tag: protocol.encode_ack(tag, key))

    async def room(self) -> int:
        """Return how many more executions the agent has room for."""
        return await self._value(protocol.encode_room)

    async def close(self) -> None:
        """Close the connection; outstanding requests fail with AgentClosedError. The box goes on."""
        self._shut()
        while self._discards:
            await asyncio.wait(self._discards)

    # -- requests --

    async def _value(self, encode: Callable[[int], bytes], fds: Sequence[int] = ()) -> int:
        """Send a request that is answered by OK and return its value."""
        tag, pending = self._start(encode, fds)
        message, fd = await self._wait(tag, pending)
        if isinstance(message, Ok):
            return message.value
        self._discard(fd)
        self._lose()
        raise ProtocolError("cannot use the agent's answer: a descriptor was not asked for")

    async def _fd(
        self,
        encode: Callable[[int], bytes],
        fds: Sequence[int] = (),
        undo: Callable[[Fd], None] | None = None,
    ) -> tuple[Fd, int]:
        """Send a request that is answered by a descriptor; return both."""
        tag, pending = self._start(encode, fds)
        pending.undo = undo
        message, fd = await self._wait(tag, pending)
        if isinstance(message, Fd):
            return message, fd
        self._lose()
        raise ProtocolError("cannot use the agent's answer: a descriptor is missing")

    def _start(self, encode: Callable[[int], bytes], fds: Sequence[int]) -> tuple[int, _Pending]:
        """Send the request, or queue it behind those for which the socket has no room."""
        if self._closed:
            raise AgentClosedError("cannot reach the devbox's agent: the connection is closed")
        if len(self._pending) >= OUTSTANDING_MAX:
            raise AgentError(Stage.BUSY, errno.EAGAIN)
        self._tag = self._tag % 0xFFFFFFFF + 1
        while self._tag in self._pending:
            self._tag = self._tag % 0xFFFFFFFF + 1
        frame = encode(self._tag)
        if self._outgoing or not self._send(frame, fds):
            self._outgoing.append((self._tag, frame, fds))
            self._loop.add_writer(self._socket, self._writable)
        pending = _Pending(self._loop.create_future())
        self._pending[self._tag] = pending
        return self._tag, pending

    async def _wait(self, tag: int, pending: _Pending) -> tuple[Message, int]:
        """Wait for the final answer. A request that was not yet sent is taken back when the caller gives up."""
        try:
            message, fd = await pending.future
        except asyncio.CancelledError:
            self._abandon(tag, pending)
            raise
        if isinstance(message, Error):
            raise AgentError(message.stage, message.errno)
        return message, fd

    def _abandon(self, tag: int, pending: _Pending) -> None:
        for item in self._outgoing:
            if item[0] == tag:
                self._outgoing.remove(item)
                self._pending.pop(tag, None)
                return
        if pending.future.done() and not pending.future.cancelled() and not pending.future.exception():
            self._drop_answer(pending, *pending.future.result())

    def _drop_answer(self, pending: _Pending, message: Message, fd: int) -> None:
        """Nobody waits for this answer any more: nothing of it may stay open, here or in the box."""
        if fd >= 0:
            self._discard(fd)
        if isinstance(message, Fd) and message.temporary and pending.undo:
            pending.undo(message)

    def _remove_late(self, user: str, late: Fd) -> None:
        with contextlib.suppress(AgentError, AgentClosedError, ProtocolError):
            encode = lambda tag: protocol.encode_unlink(tag, user, late.temporary, 10_000)  # noqa: E731
            _, pending = self._start(encode, ())
            pending.future.cancel()

    def _send(self, frame: bytes, fds: Sequence[int]) -> bool:
        """Send one frame; False when the socket has no room."""
        try:
            if fds:
                socket.send_fds(self._socket, [frame], fds, socket.MSG_NOSIGNAL)
            else:
                self._socket.send(frame, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError) as error:
            # Answers may still be in the receive buffer: the end of file, not this, ends the connection.
            raise AgentClosedError("cannot reach the devbox's agent: it closed the connection") from error
        return True

    def _writable(self) -> None:
        try:
            while self._outgoing and self._send(*self._outgoing[0][1:]):
                self._outgoing.popleft()
        except OSError as error:
            tag = self._outgoing.popleft()[0]
            pending = self._pending.pop(tag)
            if not pending.future.done():
                pending.future.set_exception(error)
        if not self._outgoing:
            self._loop.remove_writer(self._socket)

    # -- answers --

    def _readable(self) -> None:
        """Take what has come, a bounded number of frames in one turn."""
        for _ in range(_FRAMES_A_TURN):
            if self._closed:
                return
            try:
                data, control, flags, _ = self._socket.recvmsg(
                    protocol.FRAME_MAX + 1, _CONTROL_BYTES, socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._lose()
                return
            fds = _descriptors(control)
            if not data or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or not self._take(data, fds):
                for fd in fds:
                    self._discard(fd)
                self._lose()
                return

    def _take(self, data: bytes, fds: Sequence[int]) -> bool:
        """Hand one frame to whom it concerns; False when it is not what the protocol allows."""
        try:
            message = protocol.decode(data, len(fds))
        except ProtocolError:
            return False
        if isinstance(message, Exit):
            self._on_exit(_exit_event(message))
            return True
        if isinstance(message, Stall):
            self._on_stall(message.key, message.errno)
            return True
        if isinstance(message, Entry):
            return self._take_entry(message)
        pending = self._pending.pop(message.tag, None)
        if pending is None:
            return False
        fd = fds[0] if fds else -1
        if pending.future.done():
            self._drop_answer(pending, message, fd)
        else:
            pending.future.set_result((message, fd))
        return True

    def _take_entry(self, entry: Entry) -> bool:
        pending = self._pending.get(entry.tag)
        if pending is None or len(pending.entries) >= ENTRIES_MAX:
            return False
        pending.entries.append(entry)
        return True

    def _accept(self, answer: Fd, fd: int, *, writing: bool) -> int:
        """Check the descriptor of a file; a pipe is replaced by a non-blocking one of our own."""
        with self._refusing(fd, Stage.TYPE):
            if not answer.kind:
                descriptors.check_file(fd)
                return fd
            reopened = descriptors.reopen_pipe(fd, writing=writing)
        self._discard(fd)
        return reopened

    @contextlib.contextmanager
    def _refusing(self, fd: int, stage: Stage) -> Iterator[None]:
        """Close a descriptor that is not what it should be, and say so as an AgentError."""
        try:
            yield
        except (descriptors.DescriptorError, OSError) as error:
            self._discard(fd)
            raise AgentError(stage, descriptors.error_number(error)) from error

    def _discard(self, fd: int) -> None:
        """Close a descriptor of the box in a thread, for its close may block; `close` awaits them all."""
        future = self._loop.run_in_executor(None, os.close, fd)
        self._discards.add(future)
        future.add_done_callback(self._discards.discard)

    # -- the end --

    def _lose(self) -> None:
        if not self._closed:
            self._shut()
            if self.generation:
                self._on_closed()

    def _shut(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._outgoing.clear()
        waiting, self._pending = self._pending, {}
        for pending in waiting.values():
            if not pending.future.done():
                pending.future.set_exception(AgentClosedError("cannot reach the devbox's agent: it went away"))


def _descriptors(control: list[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors of a message."""
    fds: list[int] = []
    for level, kind, data in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.extend(struct.unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4]))
    return fds


def _exit_event(message: Exit) -> ExitEvent:
    killed = message.killed
    return ExitEvent(
        key=message.key,
        status=128 + message.value if killed else message.value,
        signal=message.value if killed else None,
        stdout_length=message.stdout_length,
        stderr_length=message.stderr_length,
        stdout_truncated=ExitFlags.STDOUT_TRUNCATED in message.flags,
        stderr_truncated=ExitFlags.STDERR_TRUNCATED in message.flags,
        shell_died=ExitFlags.SHELL_DIED in message.flags,
    )


@contextlib.contextmanager
def _memory(name: str, content: bytes) -> Iterator[int]:
    """A descriptor of an anonymous file with this content."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        yield fd
    finally:
        os.close(fd)
