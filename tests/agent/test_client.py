"""The client against an agent that lies: a socket of the test's own speaks in the agent's place."""

import asyncio
import contextlib
import os
import socket
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devboxd.agent.client import AgentClient, AgentClosedError, AgentError
from devboxd.agent.protocol import Stage, Verb

pytestmark = pytest.mark.anyio


class Liar:
    """Answers HELLO properly, then what a test tells it to."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="devboxd-liar-")
        self.path = Path(self.folder.name) / "agent.sock"
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(self.path))
        self.listener.listen()
        self.listener.setblocking(False)
        self.events: list[object] = []
        self.peer: socket.socket
        self.client: AgentClient

    async def start(self, generation: int = 1) -> None:
        connecting = asyncio.create_task(
            AgentClient.connect(
                self.path,
                on_exit=self.events.append,
                on_stall=lambda key, number: self.events.append((key, number)),
                on_closed=lambda: self.events.append("closed"),
            )
        )
        loop = asyncio.get_running_loop()
        self.peer, _ = await loop.sock_accept(self.listener)
        tag = await self.request()
        self.say(struct.pack("<IIQ", Verb.OK, tag, generation))
        self.client = await connecting

    async def request(self) -> int:
        """Take the next request; its tag."""
        data = await asyncio.get_running_loop().sock_recv(self.peer, 20000)
        return struct.unpack_from("<I", data, 4)[0]

    def say(self, frame: bytes, *fds: int) -> None:
        socket.send_fds(self.peer, [frame], fds)

    async def answer(self, coroutine, verb: Verb, rest: bytes, *fds: int):
        """Await a request of the client that is answered so."""
        task = asyncio.create_task(coroutine)
        tag = await self.request()
        self.say(struct.pack("<II", verb, tag) + rest, *fds)
        return await task

    async def stop(self) -> None:
        with contextlib.suppress(AttributeError):
            await self.client.close()
            self.peer.close()
        self.listener.close()
        self.folder.cleanup()


@pytest.fixture
async def liar(anyio_backend) -> AsyncIterator[Liar]:
    before = sorted(os.listdir("/proc/self/fd"))
    made = Liar()
    await made.start()
    yield made
    await made.stop()
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def fd_frame(kind: int, temporary: bytes = b"", target: bytes = b"") -> bytes:
    texts = b"".join(struct.pack("<I", len(t)) + t for t in (temporary, target))
    return struct.pack("<Q", kind) + texts


@contextlib.contextmanager
def descriptors(what: str):
    """A descriptor that should not be taken, by its name."""
    with contextlib.ExitStack() as stack:
        if what == "named fifo":
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            os.mkfifo(f"{folder}/f")
            fd = os.open(f"{folder}/f", os.O_RDWR | os.O_NONBLOCK)
        elif what == "pipe":
            fd, other = os.pipe()
            stack.callback(os.close, other)
        elif what == "unix socket":
            one, two = socket.socketpair()
            stack.callback(two.close)
            fd = one.detach()
        elif what == "udp socket":
            fd = socket.socket(socket.AF_INET, socket.SOCK_DGRAM).detach()
        else:
            fd = os.open(what, os.O_RDONLY)
        stack.callback(os.close, fd)
        yield fd


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(
    "what", ["named fifo", "pipe", "unix socket", "/proc/self/status", "/dev/null", "/etc", "/etc/passwd"]
)
async def test_files_that_are_none(liar, what, kind):
    with descriptors(what) as fd:
        if (what, kind) in {("pipe", 1), ("/etc/passwd", 0)}:
            opened = await liar.answer(liar.client.read("u", "p"), Verb.FD, fd_frame(kind), fd)
            assert opened.pipe == bool(kind)
            os.close(opened.fd)
            return
        with pytest.raises(AgentError) as caught:
            await liar.answer(liar.client.read("u", "p"), Verb.FD, fd_frame(kind), fd)
        assert caught.value.stage is Stage.TYPE
        paths = (b"/t", b"/u") if not kind else (b"", b"")
        with pytest.raises(AgentError):
            await liar.answer(liar.client.write("u", "p"), Verb.FD, fd_frame(kind, *paths), fd)


@pytest.mark.parametrize("what", ["unix socket", "udp socket", "pipe", "/dev/null", "/etc/passwd"])
async def test_sockets_and_terminals_that_are_none(liar, what):
    with descriptors(what) as fd:
        with pytest.raises(AgentError) as caught:
            await liar.answer(liar.client.dial(80), Verb.FD, fd_frame(0), fd)
        assert caught.value.stage is Stage.CONNECT
        with pytest.raises(AgentError) as caught:
            await liar.answer(liar.client.pty("k", 1, 1, b"record"), Verb.FD, fd_frame(0), fd)
        assert caught.value.stage is Stage.TERMINAL


async def test_a_dialled_socket_never_lingers(liar):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        taken = await liar.answer(liar.client.dial(80), Verb.FD, fd_frame(0), one.fileno())
        assert taken.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)[:4] == bytes(4)  # off
        assert not taken.getblocking()
        taken.close()


@pytest.mark.parametrize(
    ("frame", "count"),
    [
        (b"x", 0),
        (struct.pack("<IIQ", Verb.OK, 4_000_000, 1), 0),
        (struct.pack("<IIQ", Verb.OK, 0, 1), 0),
        (struct.pack("<II", Verb.EXIT, 0), 0),
        (struct.pack("<IIQ", Verb.OK, 2, 1), 1),
        (struct.pack("<II", Verb.FD, 2) + fd_frame(0), 2),
        (struct.pack("<II", Verb.FD, 2) + fd_frame(0), 30),
        (struct.pack("<II", Verb.OK, 2) + b"x" * 17000, 0),
        (struct.pack("<III", Verb.ENTRY, 9, 1) + b"k" + bytes(44), 0),
    ],
)
async def test_anything_off_ends_the_connection(liar, frame, count):
    waiting = asyncio.create_task(liar.client.list())
    await liar.request()
    with descriptors("/dev/null") as fd:
        liar.say(frame, *[fd] * count)
        with pytest.raises(AgentClosedError):
            await waiting
    assert liar.events == ["closed"]
    with pytest.raises(AgentClosedError):
        await liar.client.list()


async def test_an_answer_of_another_kind(liar):
    with descriptors("/dev/null") as fd, pytest.raises(AgentClosedError):
        await liar.answer(liar.client.ack("k"), Verb.FD, fd_frame(0), fd)
    assert liar.events == ["closed"]


async def test_a_list_that_is_none(liar):
    with descriptors("/dev/null") as fd, pytest.raises(AgentClosedError):
        await liar.answer(liar.client.list(), Verb.FD, fd_frame(0), fd)


async def test_a_list_that_does_not_add_up(liar):
    with pytest.raises(AgentClosedError):
        await liar.answer(liar.client.list(), Verb.OK, struct.pack("<Q", 5))


async def test_a_descriptor_without_need_is_a_lie(liar):
    with pytest.raises(AgentClosedError):
        await liar.answer(liar.client.read("u", "p"), Verb.OK, struct.pack("<Q", 5))


async def test_a_silent_agent_keeps_only_its_callers_waiting(liar):
    liar.peer.setblocking(False)
    tasks = [asyncio.create_task(liar.client.read("u", "x" * 15_000)) for _ in range(200)]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    await asyncio.sleep(0)
    answered = 0
    for _ in range(100):
        tag = await liar.request()
        name = b"ENOENT"
        liar.say(struct.pack("<IIIII", Verb.ERROR, tag, Stage.OPEN, 2, len(name)) + name)
        await asyncio.sleep(0)
        answered = sum(task.done() and not task.cancelled() for task in tasks)
        if answered == 100:
            break
    await liar.client.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(r, AgentError | AgentClosedError | asyncio.CancelledError) for r in results)


async def test_another_generation(anyio_backend):
    liar = Liar()
    with pytest.raises(AgentClosedError):
        await liar.start(generation=2)
    liar.peer.close()
    await liar.stop()


async def test_nobody_there(tmp_path):
    def nothing(*_: object) -> None: ...

    with pytest.raises(FileNotFoundError):
        await AgentClient.connect(tmp_path / "none", on_exit=nothing, on_stall=nothing, on_closed=nothing)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
    with pytest.raises(ConnectionRefusedError):
        await AgentClient.connect(tmp_path / "s", on_exit=nothing, on_stall=nothing, on_closed=nothing)
