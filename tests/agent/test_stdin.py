"""STDIN: what was accepted is delivered once and in order."""

import errno
import os

import pytest

from devboxd.agent.client import AgentError
from devboxd.agent.protocol import Scope, Stage

pytestmark = [pytest.mark.anyio, pytest.mark.box]


async def send(session, key: str, data: bytes, *, eof: bool = False) -> int:
    return await session.client.stdin(key, session.box.feed(key, data), eof)


async def test_texts_then_eof(session):
    await session.start("cat", ["cat"], stdin=True)
    for number in range(50):
        await send(session, "cat", b"line %d\n" % number)
    await send(session, "cat", b"last", eof=True)
    assert (await session.exited("cat")).status == 0
    assert session.box.output("cat", "out") == b"".join(b"line %d\n" % n for n in range(50)) + b"last"


async def test_a_spool_larger_than_the_pipe_arrives_whole(session):
    data = os.urandom(5_000_000)
    await session.start("cat", ["bash", "-c", "sleep 0.2; exec cat"], stdin=True)
    assert await send(session, "cat", data) < len(data)
    await send(session, "cat", b"end", eof=True)
    await session.exited("cat")
    assert session.box.output("cat", "out") == data + b"end"


async def test_a_reader_that_never_reads_keeps_nobody_waiting(session):
    await session.start("sleep", ["sleep", "60"], stdin=True)
    position = await send(session, "sleep", b"x" * 1_000_000, eof=True)
    assert 0 < position <= 1 << 20
    assert (await session.run("other", "echo fine")).stdout == b"fine\n"
    assert await session.client.stdin("sleep", 1_000_000, True) == position
    await session.client.signal("sleep", 9, Scope.PROCESS)
    assert (await session.exited("sleep")).signal == 9


async def test_a_reader_that_is_gone_is_told(session):
    await session.start("one", ["bash", "-c", "exec <&-; echo closed; sleep 60"], stdin=True)
    await session.until(lambda: session.box.output("one", "out"))
    with pytest.raises(AgentError) as caught:
        await send(session, "one", b"x")
    assert (caught.value.stage, caught.value.errno) == (Stage.STDIN, errno.EPIPE)


async def test_nothing_follows_eof(session):
    await session.start("cat", ["cat"], stdin=True)
    assert await send(session, "cat", b"text", eof=True) == 4
    await session.exited("cat")
    assert await session.client.stdin("cat", 4, True) == 4  # told again, as after a lost answer
    with pytest.raises(AgentError) as caught:
        await send(session, "cat", b"more")
    assert (caught.value.stage, caught.value.errno) == (Stage.STDIN, errno.EPIPE)


async def test_a_command_without_stdin(session):
    await session.start("one", ["sleep", "60"])
    with pytest.raises(AgentError) as caught:
        await session.client.stdin("one", 1, False)
    assert (caught.value.stage, caught.value.errno) == (Stage.STDIN, errno.EINVAL)
    assert (await session.run("null", "cat; readlink /proc/self/fd/0")).stdout == b"/dev/null\n"


async def test_a_length_ahead_of_the_spool_waits_for_it(session):
    await session.start("cat", ["cat"], stdin=True)
    session.box.feed("cat", b"abc")
    assert await session.client.stdin("cat", 6, True) == 3
    session.box.feed("cat", b"def")
    await session.client.stdin("cat", 6, True)
    await session.exited("cat")
    assert session.box.output("cat", "out") == b"abcdef"


async def test_the_position_survives_the_server(box):
    first = await box.session()
    await first.start("cat", ["bash", "-c", "while [ ! -e /tmp/go ]; do sleep 0.01; done; exec cat"], stdin=True)
    data = os.urandom(300_000)
    position = await send(first, "cat", data)
    await first.client.close()
    second = await box.session()
    (entry,) = await second.client.list()
    assert entry.position == position
    assert await second.client.stdin("cat", len(data), False) == position
    await second.run("go", "touch /tmp/go")
    await send(second, "cat", b"more", eof=True)
    await second.exited("cat")
    assert box.output("cat", "out") == data + b"more"
