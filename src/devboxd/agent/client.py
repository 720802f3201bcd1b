"""The asyncio client of `devboxd-init`: one connection to one box.

Requests may be outstanding side by side. What the agent sends is hostile: at most four descriptors are taken with a
message, each is checked for what it is, and anything off the protocol, silence too, ends the connection. Nothing of
a box is closed on the event loop, not even by the kernel: a socket's close waits as long as a box likes.
"""

import asyncio
import contextlib
import errno
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Self

from devboxd.agent import descriptors, messages, protocol
from devboxd.agent.protocol import Entry, Error, Exit, ExitFlags, Fd, Message, Ok, ProtocolError, Scope, Stage, Stall

OUTSTANDING_MAX: Final = 1024
"""Requests that one connection has unanswered at most."""
ENTRIES_MAX: Final = 4096
"""Entries of one LIST that are believed, and ends that are told before it."""
_GREET_S: Final = 10.0
"""How long HELLO and LIST wait for their answers."""
_ANSWER_S: Final = 20.0
"""How long a request waits for its answer, beyond a deadline of its own, until the agent counts as broken."""
_START_S: Final = 300.0
"""As _ANSWER_S, for starts: their answer waits for an exec in a box that may be short of everything."""
_LOOK_S: Final = 2.0
_SLACK_S: Final = 8.0
_CLOSE_S: Final = 1.0
_LAST_S: Final = 1.0
_FRAMES_A_TURN: Final = 64
_STALLS_A_SPAN: Final = 400
_SPAN_S: Final = 0.1


class AgentError(Exception):
    """The agent refused a request: where (stage), the Linux errno (0 if none) and words for people."""

    def __init__(self, stage: Stage, number: int, words: str = "") -> None:
        self.stage = stage
        self.errno = number
        self.name = words or (os.strerror(number).lower() if number else "no reason was given")
        super().__init__(f"cannot {_STAGE_WORDS.get(stage, 'do this in the devbox')}: {self.name}")


class AgentClosedError(ConnectionError):
    """The connection ended before the answer came, or with it; whether the request was carried out is not known."""


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
    """A request without its final answer, which must come `until` a time of the loop.

    `undo` gets the answer when nobody waits for it any more.
    """

    future: asyncio.Future[tuple[Message, int]]
    until: float
    entries: list[Entry] = field(default_factory=list)
    undo: Callable[[Fd], None] | None = None


def _milliseconds(seconds: float) -> int:
    return max(1, min(int(seconds * 1000), 600_000))


def _path(path: str | bytes) -> bytes:
    return os.fsencode(path)


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
        self._over = asyncio.Event()
        self._tag = 0
        self._pending: dict[int, _Pending] = {}
        self._outgoing: deque[tuple[int, bytes, Sequence[int]]] = deque()
        self._discards: set[asyncio.Future[None]] = set()
        self._alive: set[str] = set()
        self._early: set[str] = set()
        self._listed = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._span_end = 0.0
        self._stalls = 0
        self.fault = ""
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
        client = cls(messages.connect(path), on_exit, on_stall, on_closed)
        try:
            async with asyncio.timeout(_GREET_S):
                client.generation = await client._value(protocol.encode_hello)
        except TimeoutError:
            await client.close()
            raise AgentClosedError("cannot reach the devbox's agent: it does not answer") from None
        except BaseException:
            await client.close()
            raise
        if client.generation != protocol.GENERATION:
            await client.close()
            raise AgentClosedError(f"cannot speak generation {client.generation} of the agent's protocol")
        return client

    @property
    def closed(self) -> bool:
        """Whether the connection has ended, by `close` or because it was lost.

        `fault` says how the agent broke the protocol, and stays empty when the connection just ended.
        """
        return self._closed

    async def spawn(self, key: str, record: bytes, stdout: int, stderr: int, stdin: int | None, cap: int) -> int:
        """Start a command and return its pid in the box once exec succeeded. The descriptors are only borrowed."""
        with messages.memory("record", record) as memory:
            fds = [memory, stdout, stderr, *([] if stdin is None else [stdin])]
            return await self._begin(
                key, lambda t: protocol.encode_spawn(t, key, stdin=stdin is not None, cap=cap), fds
            )

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
        answer, fd = await self._fd(
            lambda tag: protocol.encode_read(tag, user, _path(path), _milliseconds(deadline)), deadline + _SLACK_S
        )
        return OpenedFile(self._accept(answer, fd, writing=False), bool(answer.kind))

    async def write(self, user: str, path: str | bytes, mode: int = 0o644, deadline: float = 10.0) -> OpenedTarget:
        """Open a file for writing as the user: see OpenedTarget. `mode` holds for a new file."""
        answer, fd = await self._fd(
            lambda tag: protocol.encode_write(tag, user, _path(path), mode, _milliseconds(deadline)),
            deadline + _SLACK_S,
            undo=lambda late: self._remove_late(user, late),
        )
        fd = self._accept(answer, fd, writing=True)
        return OpenedTarget(fd, bool(answer.kind), answer.temporary, answer.target)

    async def rename(self, user: str, source: str | bytes, target: str | bytes, deadline: float = 10.0) -> None:
        """Rename a file as the user."""
        names = _path(source), _path(target)
        encode = lambda tag: protocol.encode_rename(tag, user, *names, _milliseconds(deadline))  # noqa: E731
        await self._value(encode, seconds=deadline + _SLACK_S)

    async def unlink(self, user: str, path: str | bytes, deadline: float = 10.0) -> None:
        """Remove a file as the user."""
        encode = lambda tag: protocol.encode_unlink(tag, user, _path(path), _milliseconds(deadline))  # noqa: E731
        await self._value(encode, seconds=deadline + _SLACK_S)

    async def dial(self, port: int, deadline: float = 10.0) -> socket.socket:
        """Return a non-blocking TCP socket connected to a port of the box."""
        encode = lambda tag: protocol.encode_dial(tag, port, _milliseconds(deadline))  # noqa: E731
        _, fd = await self._fd(encode, deadline + _SLACK_S)
        with self._refusing(fd, Stage.CONNECT):
            return descriptors.take_socket(fd)

    async def pty(self, key: str, rows: int, columns: int, record: bytes) -> int:
        """Start a command in a terminal, or find the living one of that key; return the master, which the caller owns.

        Its reads and writes block: they belong into a thread.
        """
        with messages.memory("record", record) as memory:
            self._alive.add(key)
            _, fd = await self._fd(lambda tag: protocol.encode_pty(tag, key, rows, columns), _START_S, [memory])
        with self._refusing(fd, Stage.TERMINAL):
            descriptors.check_terminal(fd)
            return fd

    async def resize(self, key: str, rows: int, columns: int) -> None:
        """Set a terminal's size in characters."""
        await self._value(lambda tag: protocol.encode_resize(tag, key, rows, columns))

    async def shell(self, key: str, record: bytes) -> int:
        """Start a shell (descriptors 20 and 21 are its commands and control pipes) and return its pid."""
        with messages.memory("record", record) as memory:
            return await self._begin(key, lambda tag: protocol.encode_shell(tag, key), [memory])

    async def run(
        self, shell: str, key: str, command: bytes, stdout: int, stderr: int, stdin: int | None, cap: int
    ) -> None:
        """Run a command in a shell; returns when the shell was told. The descriptors are only borrowed."""
        with messages.memory("command", command) as memory:
            fds = [memory, stdout, stderr, *([] if stdin is None else [stdin])]
            attached = stdin is not None
            await self._begin(key, lambda tag: protocol.encode_run(tag, shell, key, stdin=attached, cap=cap), fds)

    async def list(self) -> list[Entry]:
        """Return all that the agent knows and that was not acknowledged."""
        tag, pending = self._start(protocol.encode_list, (), _GREET_S)
        message, fd = await self._wait(tag, pending)
        if not isinstance(message, Ok) or message.value != len(pending.entries):
            raise self._broken(fd, "its list is not as long as it says")
        if not self._listed:
            self._alive |= {entry.key for entry in pending.entries} - self._early
            self._listed = True
        return pending.entries

    async def ack(self, key: str) -> None:
        """Tell that an exit is stored: the agent forgets it."""
        await self._value(lambda tag: protocol.encode_ack(tag, key))

    async def room(self) -> int:
        """Return how many more executions the agent has room for."""
        return await self._value(protocol.encode_room)

    async def last_words(self) -> None:
        """Return when the agent, which was ended, has ended the connection too: all that it told was heard then.

        One that does not is not waited for.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await self._over.wait()

    async def close(self) -> None:
        """Close the connection; outstanding requests fail with AgentClosedError. The box goes on."""
        self._shut("it was closed")
        if self._discards:
            await asyncio.wait(self._discards, timeout=_CLOSE_S)

    # -- requests --

    async def _value(self, encode: Callable[[int], bytes], fds: Sequence[int] = (), seconds: float = _ANSWER_S) -> int:
        """Send a request that is answered by OK and return its value."""
        tag, pending = self._start(encode, fds, seconds)
        message, fd = await self._wait(tag, pending)
        if isinstance(message, Ok):
            return message.value
        raise self._broken(fd, "it answered with a descriptor that was not asked for")

    async def _begin(self, key: str, encode: Callable[[int], bytes], fds: Sequence[int]) -> int:
        """Send a request after whose success the end of `key` may be told, once."""
        self._alive.add(key)
        try:
            return await self._value(encode, fds, _START_S)
        except AgentError as error:
            if error.stage is not Stage.DUPLICATE:
                self._alive.discard(key)
            raise

    async def _fd(
        self,
        encode: Callable[[int], bytes],
        seconds: float,
        fds: Sequence[int] = (),
        undo: Callable[[Fd], None] | None = None,
    ) -> tuple[Fd, int]:
        """Send a request that is answered by a descriptor; return both."""
        tag, pending = self._start(encode, fds, seconds)
        pending.undo = undo
        message, fd = await self._wait(tag, pending)
        if isinstance(message, Fd):
            return message, fd
        raise self._broken(fd, "it answered without the descriptor that was asked for")

    def _broken(self, fd: int, why: str) -> AgentClosedError:
        """The answer is not one to the request: nothing else of this agent is believed."""
        if fd >= 0:
            self._discard(fd)
        self._lose(why)
        return AgentClosedError(f"cannot use the agent's answer: {why}")

    def _start(
        self, encode: Callable[[int], bytes], fds: Sequence[int], seconds: float = _ANSWER_S
    ) -> tuple[int, _Pending]:
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
        pending = _Pending(self._loop.create_future(), self._loop.time() + seconds)
        self._pending[self._tag] = pending
        if self._watchdog is None:
            self._watchdog = self._loop.call_later(_LOOK_S, self._look)
        return self._tag, pending

    def _look(self) -> None:
        """An agent that leaves a request unanswered is broken; looked at now and then while there are some."""
        now = self._loop.time()
        self._watchdog = self._loop.call_later(_LOOK_S, self._look) if self._pending else None
        if any(pending.until < now for pending in self._pending.values()):
            self._lose("it did not answer a request in time")

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
        with contextlib.suppress(AgentError, AgentClosedError):
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
            if self._closed or self._stalls > _STALLS_A_SPAN:
                return
            fds: list[int] = []
            try:
                self._take(messages.receive(self._socket, fds), fds)
            except (BlockingIOError, InterruptedError):
                return
            except (ProtocolError, OSError) as error:
                for fd in fds:
                    self._discard(fd)
                self._lose(str(error), fault=isinstance(error, ProtocolError))
                return

    def _take(self, data: bytes, fds: Sequence[int]) -> None:
        """Hand one frame to whom it concerns. Raises ProtocolError when it is not what the protocol allows."""
        message = protocol.decode(data, len(fds))
        if isinstance(message, Exit):
            return self._take_exit(message)
        if isinstance(message, Stall):
            return self._take_stall(message)
        if isinstance(message, Entry):
            return self._take_entry(message)
        pending = self._pending.pop(message.tag, None)
        if pending is None:
            raise ProtocolError("it answered a request that nobody made")
        fd = fds[0] if fds else -1
        if pending.future.done():
            self._drop_answer(pending, message, fd)
        else:
            pending.future.set_result((message, fd))

    def _take_exit(self, message: Exit) -> None:
        """What was started here or listed ends once; before the list, the ends of earlier connections are told."""
        key = message.key
        if key in self._alive:
            self._alive.discard(key)
        elif self._listed or key in self._early or len(self._early) >= ENTRIES_MAX:
            raise ProtocolError("it told the end of what does not run")
        else:
            self._early.add(key)
        self._on_exit(_exit_event(message))

    def _take_stall(self, message: Stall) -> None:
        """The only frames without a bound: past so many in a while nothing is read until the while is over."""
        now = self._loop.time()
        if now >= self._span_end:
            self._span_end, self._stalls = now + _SPAN_S, 0
        self._stalls += 1
        self._on_stall(message.key, message.errno)
        if self._stalls > _STALLS_A_SPAN:
            self._loop.remove_reader(self._socket)
            self._loop.call_at(self._span_end, self._go_on)

    def _go_on(self) -> None:
        self._stalls = 0
        if not self._closed:
            self._loop.add_reader(self._socket, self._readable)

    def _take_entry(self, entry: Entry) -> None:
        pending = self._pending.get(entry.tag)
        if pending is None or len(pending.entries) >= ENTRIES_MAX:
            raise ProtocolError("its list was not asked for, or is too long")
        pending.entries.append(entry)

    def _accept(self, answer: Fd, fd: int, *, writing: bool) -> int:
        """Check the descriptor of a file; a pipe is replaced by a non-blocking one of our own."""
        with self._refusing(fd, Stage.TYPE):
            if not answer.kind:
                descriptors.check_file(fd, writing=writing)
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
        """Close a descriptor in a thread of its own: its close takes as long as the box likes."""
        future = self._loop.create_future()
        self._discards.add(future)
        future.add_done_callback(self._discards.discard)

        def close() -> None:
            descriptors.close(fd)
            with contextlib.suppress(RuntimeError):  # the loop may have ended first
                self._loop.call_soon_threadsafe(future.set_result, None)

        threading.Thread(target=close, name="close", daemon=True).start()

    # -- the end --

    def _lose(self, why: str, *, fault: bool = True) -> None:
        if not self._closed:
            self.fault = why if fault else ""
            self._shut(why)
            if self.generation:
                self._on_closed()

    def _shut(self, why: str) -> None:
        if self._closed:
            return
        self._closed = True
        self._over.set()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._discard(self._socket.detach())  # descriptors in messages that nobody has read are closed with it
        self._outgoing.clear()
        waiting, self._pending = self._pending, {}
        for pending in waiting.values():
            if not pending.future.done():
                pending.future.set_exception(AgentClosedError(f"cannot reach the devbox's agent: {why}"))


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
