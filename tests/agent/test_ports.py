"""DIAL, PTY and RESIZE."""

import asyncio
import errno
import os

import pytest

from devboxd.agent.client import AgentError
from devboxd.agent.protocol import Stage, encode_record
from support.environments import PYTHON

pytestmark = [pytest.mark.anyio, pytest.mark.box]

SERVE = """
import socket
s = socket.create_server(({address!r}, {port}), family=socket.{family}, backlog=1)
print('up', flush=True)
c, _ = s.accept()
c.sendall(b'hello ' + c.recv(100))
"""


async def serve(session, address: str, family: str, port: int) -> None:
    code = SERVE.format(address=address, family=family, port=port)
    await session.start(f"serve-{port}", [PYTHON, "-c", code])
    while not session.box.output(f"serve-{port}", "out"):
        assert session.box.output(f"serve-{port}", "err") == b""
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", "AF_INET"), ("::1", "AF_INET6")])
async def test_dial(session, address, family):
    await serve(session, address, family, 8080)
    connection = await session.client.dial(8080)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, b"world")
    assert await loop.sock_recv(connection, 100) == b"hello world"
    connection.close()


async def test_nobody_listens(session):
    for port, number in [(9, errno.ECONNREFUSED), (0, errno.EINVAL), (70000, errno.EINVAL)]:
        with pytest.raises(AgentError) as caught:
            await session.client.dial(port)
        assert (caught.value.stage, caught.value.errno) == (Stage.CONNECT, number)


async def test_a_connection_that_hangs_meets_its_deadline(session):
    code = "import socket,time\ns=socket.socket(); s.bind(('127.0.0.1',7)); s.listen(0)\n"
    code += "c=[socket.socket() for _ in range(3)]\nfor x in c: x.setblocking(False); x.connect_ex(('127.0.0.1',7))\n"
    await session.start("full", [PYTHON, "-c", code + "print('up',flush=True); time.sleep(60)"])
    await session.until(lambda: session.box.output("full", "out"))
    with pytest.raises(AgentError) as caught:
        await session.client.dial(7, 0.3)
    assert (caught.value.stage, caught.value.errno) == (Stage.OPEN, errno.ETIMEDOUT)
    command = "while ps -A -o comm= | grep -c devboxd-init | grep -qv '^1$'; do sleep 0.01; done; echo one"
    assert (await session.run("look", command)).stdout == b"one\n"


async def read_until(fd: int, text: bytes) -> bytes:
    got = b""
    async with asyncio.timeout(20):
        while text not in got:
            got += await asyncio.to_thread(os.read, fd, 4096)
    return got


async def test_a_terminal(session):
    record = encode_record(["bash", "--norc"], {"PATH": "/usr/bin:/bin", "PS1": "> ", "TERM": "dumb"}, "/", "nobody")
    master = await session.client.pty("term", 24, 80, record)
    os.write(master, b"tty; stty size; id -un; echo $((6*7))\n")
    got = await read_until(master, b"42\r\n")
    assert b"/dev/pts/" in got
    assert b"24 80" in got
    assert b"nobody" in got
    await session.client.resize("term", 30, 100)
    os.write(master, b"stty size; [ -O $(tty) ] && echo mi''ne\n")
    assert b"30 100" in await read_until(master, b"mine\r\n")
    again = await session.client.pty("term", 1, 1, record)
    os.write(again, b"echo ag''ain; exit 7\n")
    await read_until(master, b"again\r\n")
    assert (await session.exited("term")).status == 7
    with pytest.raises(AgentError) as caught:
        await session.client.pty("term", 1, 1, record)
    assert caught.value.stage is Stage.DUPLICATE
    await session.client.ack("term")
    os.close(master)
    os.close(again)


async def test_a_terminal_survives_its_reader(box):
    first = await box.session()
    record = encode_record(["bash", "--norc"], {"PATH": "/usr/bin:/bin", "TERM": "dumb"}, "/", "root")
    os.close(await first.client.pty("term", 24, 80, record))
    await first.client.close()
    second = await box.session()
    master = await second.client.pty("term", 24, 80, record)
    os.write(master, b"echo still''here; exit\n")
    await read_until(master, b"stillhere\r\n")
    assert (await second.exited("term")).status == 0
    os.close(master)


async def test_a_terminal_that_cannot_start(session):
    record = encode_record(["/no/such"], {}, "/", "root")
    for size, stage in [((24, 80), Stage.EXEC), ((70000, 1), Stage.TERMINAL)]:
        with pytest.raises(AgentError) as caught:
            await session.client.pty("term", *size, record)
        assert caught.value.stage is stage
    with pytest.raises(AgentError) as caught:
        await session.client.resize("term", 1, 1)
    assert caught.value.stage is Stage.LOOKUP
    assert await session.client.list() == []


async def test_no_terminals_in_the_box(make_box):
    box = await make_box("mkfifo /tmp/f && mount --bind /tmp/f /dev/ptmx")
    session = await box.session()
    with pytest.raises(AgentError) as caught:
        await session.client.pty("term", 1, 1, encode_record(["true"], {}, "/", "root"))
    assert caught.value.stage is Stage.TERMINAL
