"""The wire format of `devboxd-init`, generation 1: pure encoding and decoding.

docs/reference/agent-protocol.md is the authority. What comes from the agent is hostile: `decode` accepts exactly what
that document describes and raises ProtocolError for everything else.
"""

import re
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum, IntFlag
from typing import Final, NamedTuple

GENERATION: Final = 1
FRAME_MAX: Final = 16384
"""Bytes of the longest frame."""
FRAME_FDS: Final = 4
"""Descriptors that one frame carries at most."""

_KEY = re.compile(rb"[A-Za-z0-9_-]{1,64}\Z")
_ERROR_NAME = re.compile(rb"[A-Z0-9]{1,32}\Z")
_PATH_MAX = 4096


class ProtocolError(Exception):
    """A frame is not what the protocol allows."""


class Verb(IntEnum):
    """The first number of each frame."""

    HELLO = 1
    SPAWN = 2
    SIGNAL = 3
    STDIN = 4
    READ = 5
    WRITE = 6
    RENAME = 7
    UNLINK = 8
    DIAL = 9
    PTY = 10
    RESIZE = 11
    SHELL = 12
    RUN = 13
    LIST = 14
    ACK = 15
    END = 16
    ROOM = 17
    OK = 128
    ERROR = 129
    FD = 130
    ENTRY = 131
    EXIT = 132
    STALL = 133


class Stage(IntEnum):
    """Where a request failed."""

    NONE = 0
    LOOKUP = 1
    DECODE = 2
    BUSY = 3
    FORK = 4
    USER = 5
    GROUPS = 6
    DIRECTORY = 7
    EXEC = 8
    STDIN = 9
    OPEN = 10
    TYPE = 11
    PARENTS = 12
    RENAME = 13
    CONNECT = 14
    TERMINAL = 15
    DUPLICATE = 16


class Scope(IntEnum):
    """Whom a signal reaches."""

    PROCESS = 0
    GROUP = 1
    ALL = 2


class EntryType(IntEnum):
    """What a key of the agent's list names."""

    EXECUTION = 0
    TERMINAL = 1
    SHELL = 2
    COMMAND = 3


class EntryState(IntEnum):
    """How far an entry of the agent's list has come."""

    STARTING = 0
    RUNNING = 1
    ENDED = 2


class ExitFlags(IntFlag):
    """What else an EXIT tells."""

    STDOUT_TRUNCATED = 1
    STDERR_TRUNCATED = 2
    SHELL_DIED = 4


class Ok(NamedTuple):
    """A request succeeded; the value's meaning depends on the request."""

    tag: int
    value: int


class Error(NamedTuple):
    """A request failed at `stage` with a Linux errno and its name."""

    tag: int
    stage: Stage
    errno: int
    name: str


class Fd(NamedTuple):
    """A descriptor came along; kind 1 is a pipe. The paths are set by WRITE alone."""

    tag: int
    kind: int
    temporary: bytes
    target: bytes


class Entry(NamedTuple):
    """One line of the answer to LIST; lengths and positions in bytes."""

    tag: int
    key: str
    type: EntryType
    state: EntryState
    pid: int
    position: int
    stdout_length: int
    stderr_length: int
    shell: str


class Exit(NamedTuple):
    """An execution, terminal or shell ended; `value` is a status, or a signal when `killed`."""

    key: str
    killed: bool
    value: int
    stdout_length: int
    stderr_length: int
    flags: ExitFlags


class Stall(NamedTuple):
    """A journal takes no more bytes for the reason errno, or flows again (0)."""

    key: str
    errno: int


Message = Ok | Error | Fd | Entry | Exit | Stall


def _text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<I", len(data)) + data


def _key(value: str) -> bytes:
    data = value.encode()
    if not _KEY.match(data):
        raise ProtocolError(f"cannot use {value[:80]!r} as a key: it must be 1 to 64 of A-Z a-z 0-9 _ -")
    return _text(data)


def _frame(verb: Verb, tag: int, *fields: bytes) -> bytes:
    frame = struct.pack("<II", verb, tag) + b"".join(fields)
    if len(frame) > FRAME_MAX:
        raise ProtocolError(f"cannot send {verb.name}: {len(frame)} bytes are more than {FRAME_MAX}")
    return frame


def _u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def _u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def encode_hello(tag: int, oldest: int = GENERATION, newest: int = GENERATION) -> bytes:
    """HELLO: the range of generations that the server speaks."""
    return _frame(Verb.HELLO, tag, _u32(oldest, newest))


def encode_spawn(tag: int, key: str, *, stdin: bool, cap: int) -> bytes:
    """SPAWN; `cap` is the most bytes of a stream that the journal takes."""
    return _frame(Verb.SPAWN, tag, _key(key), _u32(int(stdin)), _u64(cap))


def encode_signal(tag: int, key: str, signal: int, scope: Scope) -> bytes:
    """SIGNAL; the key is empty for Scope.ALL."""
    name = _text("") if scope is Scope.ALL else _key(key)
    return _frame(Verb.SIGNAL, tag, name, _u32(signal, scope))


def encode_stdin(tag: int, key: str, length: int, *, eof: bool) -> bytes:
    """STDIN: the spool holds `length` bytes; with eof that is all there will ever be."""
    return _frame(Verb.STDIN, tag, _key(key), _u64(length), _u32(int(eof)))


def encode_read(tag: int, user: str, path: bytes, deadline_ms: int) -> bytes:
    """READ."""
    return _frame(Verb.READ, tag, _text(user), _text(path), _u32(deadline_ms))


def encode_write(tag: int, user: str, path: bytes, mode: int, deadline_ms: int) -> bytes:
    """WRITE; `mode` is for a new file."""
    return _frame(Verb.WRITE, tag, _text(user), _text(path), _u32(mode, deadline_ms))


def encode_rename(tag: int, user: str, source: bytes, target: bytes, deadline_ms: int) -> bytes:
    """RENAME."""
    return _frame(Verb.RENAME, tag, _text(user), _text(source), _text(target), _u32(deadline_ms))


def encode_unlink(tag: int, user: str, path: bytes, deadline_ms: int) -> bytes:
    """UNLINK."""
    return _frame(Verb.UNLINK, tag, _text(user), _text(path), _u32(deadline_ms))


def encode_dial(tag: int, port: int, deadline_ms: int) -> bytes:
    """DIAL."""
    return _frame(Verb.DIAL, tag, _u32(port, deadline_ms))


def encode_pty(tag: int, key: str, rows: int, columns: int) -> bytes:
    """PTY."""
    return _frame(Verb.PTY, tag, _key(key), _u32(rows, columns))


def encode_resize(tag: int, key: str, rows: int, columns: int) -> bytes:
    """RESIZE."""
    return _frame(Verb.RESIZE, tag, _key(key), _u32(rows, columns))


def encode_shell(tag: int, key: str) -> bytes:
    """SHELL."""
    return _frame(Verb.SHELL, tag, _key(key))


def encode_run(tag: int, shell: str, key: str, *, stdin: bool, cap: int) -> bytes:
    """RUN."""
    return _frame(Verb.RUN, tag, _key(shell), _key(key), _u32(int(stdin)), _u64(cap))


def encode_list(tag: int) -> bytes:
    """LIST."""
    return _frame(Verb.LIST, tag)


def encode_ack(tag: int, key: str) -> bytes:
    """ACK."""
    return _frame(Verb.ACK, tag, _key(key))


def encode_end(tag: int, key: str, scope: Scope, grace_ms: int) -> bytes:
    """END: SIGTERM now, SIGKILL after the grace; not for Scope.ALL."""
    return _frame(Verb.END, tag, _key(key), _u32(scope, grace_ms))


def encode_room(tag: int) -> bytes:
    """ROOM."""
    return _frame(Verb.ROOM, tag)


def encode_record(
    argv: Sequence[str | bytes],
    env: Mapping[str, str],
    directory: str = "",
    user: str = "root",
    script: bytes = b"",
) -> bytes:
    """Encode what SPAWN, PTY and SHELL pass in a memfd.

    An empty directory is the user's home; a script becomes descriptor 9 of the command. Raises ProtocolError for an
    empty argv or a NUL in anything but the script.
    """
    strings = [*argv, *env, *env.values(), directory, user]
    if not argv or any(("\0" in s) if isinstance(s, str) else (b"\0" in s) for s in strings):
        raise ProtocolError("cannot encode a command: it is empty, or one of its strings holds a NUL")
    return b"".join(
        [
            _u32(len(argv)),
            *map(_text, argv),
            _u32(len(env)),
            *(_text(f"{name}={value}") for name, value in env.items()),
            _text(directory),
            _text(user),
            _text(script),
        ]
    )


class _Reader:
    """Takes fields off a frame."""

    def __init__(self, frame: bytes) -> None:
        self._frame = frame
        self._at = 0

    def number(self, size: int) -> int:
        """Take an unsigned integer of `size` bytes."""
        return int.from_bytes(self._take(size), "little")

    def text(self, limit: int) -> bytes:
        """Take a text of at most `limit` bytes."""
        length = self.number(4)
        if length > limit:
            raise ProtocolError(f"cannot read a frame: a text of {length} bytes, at most {limit} are allowed")
        return self._take(length)

    def key(self, *, empty: bool = False) -> str:
        """Take a key."""
        data = self.text(64)
        if not (empty and not data) and not _KEY.match(data):
            raise ProtocolError("cannot read a frame: a key has other characters than a key may have")
        return data.decode("ascii")

    def end(self) -> None:
        """Check that nothing is left."""
        if self._at != len(self._frame):
            raise ProtocolError("cannot read a frame: bytes are left over")

    def _take(self, size: int) -> bytes:
        data = self._frame[self._at : self._at + size]
        if len(data) != size:
            raise ProtocolError("cannot read a frame: it is too short")
        self._at += size
        return data


def _decode_error(tag: int, reader: _Reader) -> Error:
    stage, number, name = reader.number(4), reader.number(4), reader.text(32)
    if not _ERROR_NAME.match(name) or not 0 < stage <= max(Stage) or not 0 < number < 4096:
        raise ProtocolError("cannot read an ERROR: stage, number or name are none")
    return Error(tag, Stage(stage), number, name.decode("ascii"))


def _decode_fd(tag: int, reader: _Reader) -> Fd:
    fd = Fd(tag, reader.number(8), reader.text(_PATH_MAX), reader.text(_PATH_MAX))
    if fd.kind > 1 or bool(fd.temporary) != bool(fd.target) or b"\0" in fd.temporary + fd.target:
        raise ProtocolError("cannot read an FD: kind or paths are none")
    return fd


def _decode_entry(tag: int, reader: _Reader) -> Entry:
    key, kind, state = reader.key(), reader.number(4), reader.number(4)
    if kind > max(EntryType) or state > max(EntryState):
        raise ProtocolError("cannot read an ENTRY: type or state are none")
    pid, position, stdout, stderr = (reader.number(8) for _ in range(4))
    shell = reader.key(empty=True)
    return Entry(tag, key, EntryType(kind), EntryState(state), pid, position, stdout, stderr, shell)


def _decode_exit(reader: _Reader) -> Exit:
    key, how, value = reader.key(), reader.number(4), reader.number(4)
    stdout, stderr, flags = reader.number(8), reader.number(8), reader.number(4)
    if how > 1 or value > (64 if how else 255) or (how and not value) or flags > 7:
        raise ProtocolError("cannot read an EXIT: status or flags are none")
    return Exit(key, bool(how), value, stdout, stderr, ExitFlags(flags))


def _decode_fields(verb: int, tag: int, reader: _Reader) -> Message:
    if verb == Verb.OK:
        return Ok(tag, reader.number(8))
    if verb == Verb.ERROR:
        return _decode_error(tag, reader)
    if verb == Verb.FD:
        return _decode_fd(tag, reader)
    if verb == Verb.ENTRY:
        return _decode_entry(tag, reader)
    if verb == Verb.EXIT:
        return _decode_exit(reader)
    if verb == Verb.STALL:
        return Stall(reader.key(), reader.number(4))
    raise ProtocolError(f"cannot read a frame: no answer has the number {verb}")


def decode(frame: bytes, descriptors: int) -> Message:
    """Decode one frame from the agent that came with so many descriptors; raise ProtocolError when anything is off."""
    if len(frame) > FRAME_MAX:
        raise ProtocolError(f"cannot read a frame of {len(frame)} bytes: {FRAME_MAX} is the most")
    reader = _Reader(frame)
    verb, tag = reader.number(4), reader.number(4)
    if (tag == 0) != (verb in (Verb.EXIT, Verb.STALL)):
        raise ProtocolError("cannot read a frame: an event has a tag, or an answer has none")
    message = _decode_fields(verb, tag, reader)
    reader.end()
    if descriptors != (1 if isinstance(message, Fd) else 0):
        raise ProtocolError(f"cannot read a frame: it came with {descriptors} descriptors")
    return message
