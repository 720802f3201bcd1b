"""The wire format: a snapshot for each generation, round trips, and hostile frames."""

import errno
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.agent import protocol
from devboxd.agent.protocol import (
    Entry,
    EntryState,
    EntryType,
    Error,
    Exit,
    ExitFlags,
    Fd,
    Ok,
    ProtocolError,
    Scope,
    Stage,
    Stall,
    Verb,
)

SNAPSHOT = Path(__file__).parent / "generation-1.json"
KEYS = st.text("abcXYZ019_-", min_size=1, max_size=64)
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
TAGS = st.integers(1, 2**32 - 1)
PATHS = st.binary(max_size=200).map(lambda b: b.replace(b"\0", b"x"))


def requests() -> dict[str, bytes]:
    p = protocol
    return {
        "hello": p.encode_hello(1),
        "spawn": p.encode_spawn(2, "exec-1", stdin=False, cap=1 << 30),
        "spawn with stdin": p.encode_spawn(3, "exec-2", stdin=True, cap=5),
        "signal a process": p.encode_signal(4, "exec-1", 2, Scope.PROCESS),
        "signal a group": p.encode_signal(5, "exec-1", 9, Scope.GROUP),
        "signal all": p.encode_signal(6, "", 15, Scope.ALL),
        "stdin": p.encode_stdin(7, "exec-2", 1 << 33, eof=True),
        "read": p.encode_read(8, "user", b"~/a\xff", 10_000),
        "write": p.encode_write(9, "1000:1000", b"/tmp/b", 0o755, 10_000),
        "rename": p.encode_rename(10, "user", b"/a", b"/b", 1),
        "unlink": p.encode_unlink(11, "user", b"/a", 1),
        "dial": p.encode_dial(12, 8080, 500),
        "pty": p.encode_pty(13, "term", 24, 80),
        "resize": p.encode_resize(14, "term", 30, 100),
        "shell": p.encode_shell(15, "shell_A"),
        "run": p.encode_run(16, "shell_A", "exec-3", stdin=False, cap=7),
        "run with stdin": p.encode_run(17, "shell_A", "exec-4", stdin=True, cap=7),
        "list": p.encode_list(18),
        "ack": p.encode_ack(2**32 - 1, "exec-1"),
        "end": p.encode_end(19, "exec-1", Scope.GROUP, 5000),
        "room": p.encode_room(20),
        "record": p.encode_record(["bash", "-lc", ". /dev/fd/9"], {"A": "b"}, "/tmp", "user", b"echo \xff\0"),
    }


ANSWERS = {
    "ok": (Ok(1, 2**40), "80000000 01000000 0000000000010000"),
    "error": (
        Error(2, Stage.OPEN, errno.ENOENT, "ENOENT"),
        "81000000 02000000 0a000000 02000000 06000000 454e4f454e54",
    ),
    "fd": (Fd(3, 1, b"", b""), "82000000 03000000 0100000000000000 00000000 00000000"),
    "fd with paths": (Fd(3, 0, b"/t", b"/u"), "82000000 03000000 0000000000000000 02000000 2f74 02000000 2f75"),
    "entry": (
        Entry(4, "k", EntryType.COMMAND, EntryState.RUNNING, 5, 6, 7, 8, "s"),
        "83000000 04000000 01000000 6b 03000000 01000000 0500000000000000 0600000000000000 0700000000000000"
        " 0800000000000000 01000000 73",
    ),
    "exit": (
        Exit("k", True, 9, 1, 2, ExitFlags.STDOUT_TRUNCATED | ExitFlags.SHELL_DIED),
        "84000000 00000000 01000000 6b 01000000 09000000 0100000000000000 0200000000000000 05000000",
    ),
    "stall": (Stall("k", errno.ENOSPC), "85000000 00000000 01000000 6b 1c000000"),
}


def test_requests_of_generation_1_stay_as_they_are():
    assert json.loads(SNAPSHOT.read_text()) == {name: frame.hex() for name, frame in requests().items()}


@pytest.mark.parametrize("name", ANSWERS)
def test_answers_of_generation_1_stay_as_they_are(name):
    message, text = ANSWERS[name]
    assert protocol.decode(bytes.fromhex(text), int(isinstance(message, Fd))) == message


@pytest.mark.parametrize("name", ANSWERS)
def test_every_cut_is_refused(name):
    message, text = ANSWERS[name]
    frame, fds = bytes.fromhex(text), int(isinstance(message, Fd))
    for length in range(len(frame)):
        with pytest.raises(ProtocolError):
            protocol.decode(frame[:length], fds)
    with pytest.raises(ProtocolError):
        protocol.decode(frame + b"\0", fds)
    with pytest.raises(ProtocolError):
        protocol.decode(frame, 1 - fds)


def text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def encode(message: protocol.Message) -> bytes:
    """Encode an answer as the agent does."""
    match message:
        case Ok(tag, value):
            return struct.pack("<IIQ", Verb.OK, tag, value)
        case Error(tag, stage, number, name):
            return struct.pack("<IIII", Verb.ERROR, tag, stage, number) + text(name.encode())
        case Fd(tag, kind, temporary, target):
            return struct.pack("<IIQ", Verb.FD, tag, kind) + text(temporary) + text(target)
        case Entry(tag, key, kind, state, pid, position, out, err, shell):
            numbers = struct.pack("<IIQQQQ", kind, state, pid, position, out, err)
            return struct.pack("<II", Verb.ENTRY, tag) + text(key.encode()) + numbers + text(shell.encode())
        case Exit(key, killed, value, out, err, flags):
            numbers = struct.pack("<IIQQI", killed, value, out, err, flags)
            return struct.pack("<II", Verb.EXIT, 0) + text(key.encode()) + numbers
        case Stall(key, number):
            return struct.pack("<II", Verb.STALL, 0) + text(key.encode()) + struct.pack("<I", number)


MESSAGES = st.one_of(
    st.builds(Ok, TAGS, U64),
    st.builds(
        Error,
        TAGS,
        st.sampled_from([s for s in Stage if s]),
        st.integers(1, 133),
        st.sampled_from(sorted(errno.errorcode.values())),
    ),
    st.builds(Fd, TAGS, st.just(0), PATHS.filter(bool), PATHS.filter(bool)),
    st.builds(Fd, TAGS, st.integers(0, 1), st.just(b""), st.just(b"")),
    st.builds(
        Entry,
        TAGS,
        KEYS,
        st.sampled_from(EntryType),
        st.sampled_from(EntryState),
        U64,
        U64,
        U64,
        U64,
        KEYS | st.just(""),
    ),
    st.builds(Exit, KEYS, st.just(False), st.integers(0, 255), U64, U64, st.integers(0, 7).map(ExitFlags)),
    st.builds(Exit, KEYS, st.just(True), st.integers(1, 64), U64, U64, st.integers(0, 7).map(ExitFlags)),
    st.builds(Stall, KEYS, U32),
)


@given(MESSAGES)
def test_what_the_agent_says_is_understood(message):
    assert protocol.decode(encode(message), int(isinstance(message, Fd))) == message


@given(st.binary(max_size=300), st.integers(0, 4))
def test_noise_is_a_protocol_error_and_nothing_else(frame, fds):
    try:
        message = protocol.decode(frame, fds)
    except ProtocolError:
        return
    assert encode(message) == frame


@given(MESSAGES, st.integers(0, 200), st.integers(0, 255))
def test_one_wrong_byte_is_refused_or_another_message(message, at, value):
    frame = bytearray(encode(message))
    frame[at % len(frame)] = value
    test_noise_is_a_protocol_error_and_nothing_else.hypothesis.inner_test(bytes(frame), int(isinstance(message, Fd)))


def read_text(data: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<I", data, at)
    return data[at + 4 : at + 4 + length], at + 4 + length


WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)


@given(
    st.lists(WORDS, min_size=1, max_size=5),
    st.dictionaries(WORDS, WORDS, max_size=4),
    WORDS,
    WORDS,
    st.binary(max_size=50),
)
def test_a_record_holds_what_was_put_in(argv, env, directory, user, script):
    data = protocol.encode_record(argv, env, directory, user, script)
    at, lists = 0, []
    for _ in range(2):
        (count,) = struct.unpack_from("<I", data, at)
        at += 4
        items = []
        for _ in range(count):
            item, at = read_text(data, at)
            items.append(item.decode())
        lists.append(items)
    assert lists == [argv, [f"{name}={value}" for name, value in env.items()]]
    rest = []
    for _ in range(3):
        item, at = read_text(data, at)
        rest.append(item)
    assert (rest, at) == ([directory.encode(), user.encode(), script], len(data))


@pytest.mark.parametrize("key", ["", "x" * 65, "a b", "a/b", "ä", "a\n"])
def test_a_key_that_is_none_is_refused(key):
    with pytest.raises(ProtocolError):
        protocol.encode_ack(1, key)


def test_what_cannot_be_encoded():
    for bad in ([], ["a\0b"], [b"a\0b"]):
        with pytest.raises(ProtocolError):
            protocol.encode_record(bad, {})
    with pytest.raises(ProtocolError):
        protocol.encode_record(["a"], {"B": "c\0"})
    with pytest.raises(ProtocolError):
        protocol.encode_read(1, "user", b"x" * protocol.FRAME_MAX, 1)
