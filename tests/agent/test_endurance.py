"""What the agent bears: lost servers, malformed frames, full disks, many commands."""

import asyncio
import itertools
import os
import random
import socket
import struct
import time
from pathlib import Path

import pytest

from devboxd.agent import protocol
from devboxd.agent.client import AgentClosedError, AgentError
from devboxd.agent.protocol import Exit, Ok, Scope, Stage, encode_record

pytestmark = [pytest.mark.anyio, pytest.mark.box]


class Raw:
    """A bare connection that may send anything."""

    def __init__(self, box, *, hello: bool = True) -> None:
        deadline = time.monotonic() + 10
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(max(0.1, deadline - time.monotonic()))
        self.socket.connect(str(box.path))
        if hello:
            self.send(protocol.encode_hello(1))
            assert self.receive() == Ok(1, protocol.GENERATION)

    def send(self, frame: bytes, *fds: int) -> None:
        socket.send_fds(self.socket, [frame], fds)

    def receive(self) -> protocol.Message | None:
        data, fds, _, _ = socket.recv_fds(self.socket, 20000, 4)
        for fd in fds:
            os.close(fd)
        return protocol.decode(data, len(fds)) if data else None

    def fill(self) -> int:
        """Send requests with tags from 1 on, reading no answer, until there is no room; their number."""
        self.socket.settimeout(0.3)
        sent = 0
        try:
            while sent < 100_000:
                self.send(protocol.encode_ack(sent + 1, "none"))
                sent += 1
        except TimeoutError:
            return sent
        raise AssertionError("the agent takes requests without end")

    def ended(self) -> bool:
        """Whether the agent closed the connection."""
        try:
            return self.receive() is None
        except ConnectionError:
            return True


def fds_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    """KiB of memory that the agent uses alone."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(rows["RssAnon"].split()[0])


async def test_an_exit_is_told_until_it_is_acknowledged(box):
    first = await box.session()
    await first.start("one", ["bash", "-c", "while [ ! -e /tmp/go ]; do sleep 0.01; done; echo done; exit 4"])
    await first.start("go", ["bash", "-c", "sleep 0.3; touch /tmp/go"])
    await first.client.close()
    await asyncio.sleep(0.6)  # both end while nobody listens
    for _ in range(3):
        session = await box.session()
        event = await session.exited("one")
        assert (event.status, event.stdout_length) == (4, 5)
        await session.client.close()
    last = await box.session()
    await last.exited("one")
    await last.client.ack("one")
    await last.client.close()
    final = await box.session()
    assert [entry.key for entry in await final.client.list()] == ["go"]
    assert "one" not in final.exits


async def test_a_newer_connection_replaces_the_older(box):
    first = await box.session()
    second = await box.session()
    async with asyncio.timeout(10):
        await first.closed.wait()
    with pytest.raises(AgentClosedError):
        await first.client.list()
    assert await second.client.list() == []


async def test_what_a_killed_server_had_sent_is_carried_out(box):
    record = encode_record(["bash", "-c", "echo here"], {"PATH": "/bin"}, "/", "root")
    for number in range(20):
        raw = Raw(box)
        memory = os.memfd_create("record")
        os.write(memory, record)
        out = box.journal(f"k{number}", "out")
        raw.send(protocol.encode_spawn(2, f"k{number}", stdin=False, cap=100), memory, out, out)
        raw.send(protocol.encode_list(3))
        raw.socket.close()
        os.close(memory)
        os.close(out)
        session = await box.session()
        assert (await session.exited(f"k{number}")).status == 0
        assert box.output(f"k{number}", "out") == b"here\n"
        await session.client.ack(f"k{number}")
        await session.client.close()


BAD_FRAMES = [
    b"\0",
    b"\0" * 7,
    protocol.encode_list(1) + b"x",
    protocol.encode_ack(1, "key")[:-1],
    struct.pack("<II", 99, 1),
    struct.pack("<II", protocol.Verb.LIST, 0),
    struct.pack("<III", protocol.Verb.ACK, 1, 0xFFFFFFFF) + b"key",
    b"\x0e\0\0\0\1\0\0\0" + b"x" * 17000,
    protocol.encode_spawn(1, "key", stdin=False, cap=1),
]


@pytest.mark.parametrize("number", range(len(BAD_FRAMES)))
async def test_a_malformed_frame_ends_the_connection_alone(session, number):
    await session.start("cat", ["cat"], stdin=True)
    box = session.box
    raw = Raw(box)
    before = fds_of(box.pid)
    fds = [os.memfd_create("x") for _ in range(2)] if BAD_FRAMES[number][:4] == b"\2\0\0\0" else []
    raw.send(BAD_FRAMES[number], *fds)
    assert raw.ended()
    for fd in fds:
        os.close(fd)
    again = await box.session()
    await again.client.list()
    assert fds_of(box.pid) == before
    await again.client.stdin("cat", box.feed("cat", b"on"), True)
    await again.exited("cat")
    assert box.output("cat", "out") == b"on"


async def test_more_descriptors_than_allowed(box):
    raw = Raw(box)
    memory = os.memfd_create("x")
    before = fds_of(box.pid)
    raw.send(protocol.encode_list(1), *[memory] * 30)
    assert raw.ended()
    raw = Raw(box)
    assert fds_of(box.pid) == before
    raw.send(protocol.encode_list(1), memory)
    assert raw.ended()
    os.close(memory)


async def test_nothing_before_hello_and_no_other_generation(box):
    raw = Raw(box, hello=False)
    raw.send(protocol.encode_list(1))
    assert raw.ended()
    raw = Raw(box, hello=False)
    raw.send(protocol.encode_hello(1, 2, 9))
    answer = raw.receive()
    assert isinstance(answer, protocol.Error)
    assert (answer.stage, answer.name) == (Stage.DECODE, "EPROTONOSUPPORT")


async def test_a_key_that_is_none_is_answered(box):
    raw = Raw(box)
    raw.send(struct.pack("<III", protocol.Verb.ACK, 5, 3) + b"a/b")
    answer = raw.receive()
    assert isinstance(answer, protocol.Error)
    assert (answer.tag, answer.stage, answer.name) == (5, Stage.DECODE, "EINVAL")


async def test_a_server_that_does_not_read_loses_nothing(box):
    """The agent's answers fill the socket: it must stop reading, keep its memory, and go on later."""
    raw = Raw(box)
    sent = raw.fill()
    raw.socket.settimeout(10)
    for tag in range(1, sent + 1):
        answer = raw.receive()
        assert isinstance(answer, protocol.Error)
        assert answer.tag == tag
    raw.send(protocol.encode_list(1))
    message = raw.receive()
    while not isinstance(message, Ok):
        message = raw.receive()


async def test_exits_wait_for_a_server_that_does_not_read(box):
    first = await box.session()
    count = 400
    await first.run("make", "mkfifo /tmp/go")
    for number in range(count):
        await first.start(f"k{number}", ["bash", "-c", "read x < /tmp/go"])
    await first.client.close()
    raw = Raw(box)
    raw.fill()
    os.close(os.open(f"/proc/{box.pid}/root/tmp/go", os.O_WRONLY))
    raw.socket.settimeout(30)
    ended = set()
    while len(ended) < count:
        message = raw.receive()
        if isinstance(message, Exit):
            ended.add(message.key)
    raw.socket.close()
    second = await box.session()
    await asyncio.gather(*(second.exited(f"k{number}") for number in range(count)))


async def test_a_full_disk_stalls_and_loses_nothing(session):
    box = session.box
    disk = box.folder / "disk"
    disk.mkdir()
    mount = await asyncio.create_subprocess_exec("mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk)
    assert await mount.wait() == 0
    try:
        filler = disk / "filler"
        filler.write_bytes(b"x" * 100_000)
        data = os.urandom(600_000)
        (box.folder / "data").write_bytes(data)
        out = os.open(disk / "out", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        err = box.journal("one", "err")
        record = encode_record(["cat"], {"PATH": "/bin"}, "/", "root")
        spool = os.open(box.folder / "data", os.O_RDONLY)
        await session.client.spawn("one", record, out, err, spool, 1 << 30)
        await session.client.stdin("one", len(data), True)
        async with asyncio.timeout(10):
            key, number = await session.stalls.get()
        assert (key, os.strerror(number)) == ("one", "No space left on device")
        assert (await session.run("other", "echo fine")).stdout == b"fine\n"
        await session.client.close()
        second = await box.session()
        async with asyncio.timeout(10):
            assert (await second.stalls.get())[0] == "one"
        with pytest.raises(TimeoutError):
            await second.exited("one", 0.7)
        remount = await asyncio.create_subprocess_exec("mount", "-o", "remount,size=2m", disk)
        assert await remount.wait() == 0
        event = await second.exited("one", 10)
        assert await second.stalls.get() == ("one", 0)
        assert (event.status, event.stdout_length) == (0, len(data))
        assert (disk / "out").read_bytes() == data
        for fd in (out, err, spool):
            os.close(fd)
        await second.client.ack("one")
    finally:
        unmount = await asyncio.create_subprocess_exec("umount", "-l", disk)
        await unmount.wait()


async def test_ten_thousand_commands_leave_nothing(session):
    """Descriptors and memory of the agent are the same before and after."""
    box, client = session.box, session.client
    sanitized = "sanitize" in box.binary.name
    count = 2_000 if sanitized else 10_000
    record = encode_record(["/bin/true"], {}, "/", "root")
    out = box.journal("all", "out")

    async def some(name: str, number: int) -> None:
        for n in range(number):
            key = f"{name}-{n}"
            await client.spawn(key, record, out, out, None, 1000)
            assert (await session.exited(key)).status == 0
            await client.ack(key)
            del session.exits[key]

    await asyncio.gather(*(some(f"warm{n}", 25) for n in range(8)))
    before = fds_of(box.pid), resident(box.pid)
    await asyncio.gather(*(some(f"k{n}", count // 8) for n in range(8)))
    assert fds_of(box.pid) == before[0]
    assert sanitized or resident(box.pid) <= before[1] + 64
    assert await client.list() == []
    os.close(out)


async def test_five_hundred_at_once_starve_nobody(session):
    """Each writes much while the rest starts; a request in between is answered soon."""
    size = 400_000
    await session.run("make", f"head -c {size} /dev/urandom > /tmp/data")
    await session.run("show", "cat /tmp/data")
    data = session.box.output("show", "out")
    keys = [f"k{number}" for number in range(500)]
    slowest = 0.0

    async def probe() -> None:
        nonlocal slowest
        while True:
            started = time.monotonic()
            await session.client.list()
            slowest = max(slowest, time.monotonic() - started)
            await asyncio.sleep(0.05)

    prober = asyncio.create_task(probe())
    started = [session.start(key, ["bash", "-c", "cat /tmp/data; echo $$ >&2"]) for key in keys]
    await asyncio.gather(*started)
    events = await asyncio.gather(*(session.exited(key) for key in keys))
    prober.cancel()
    await asyncio.wait([prober])
    assert {(event.status, event.stdout_length) for event in events} == {(0, size)}
    assert all(session.box.output(key, "out") == data for key in keys)
    assert slowest < 5


async def test_the_table_is_bounded(box):
    session = await box.session()
    record = encode_record(["sleep", "100"], {"PATH": "/bin"}, "/", "root")
    out = box.journal("all", "out")

    async def start(number: int) -> bool:
        try:
            await session.client.spawn(f"k{number}", record, out, out, None, 1)
        except AgentError as error:
            return error.stage is not Stage.BUSY
        return True

    started = [await start(number) for number in range(1030)]
    assert sum(started) == 1024
    assert len(await session.client.list()) == 1024
    await session.client.signal("", 9, Scope.ALL)
    await session.exited("k0")
    await session.client.ack("k0")
    later = itertools.count(2000)
    await session.until(lambda: start(next(later)))  # once its pipes are seen to be closed, too
    os.close(out)


async def test_few_descriptors_bound_the_table(make_box):
    box = await make_box("ulimit -n 600")
    session = await box.session()
    record = encode_record(["cat"], {"PATH": "/bin"}, "/", "root")
    out = box.journal("all", "out")
    spool = box.spool("all")

    async def fill() -> None:
        for number in range(200):
            await session.client.spawn(f"k{number}", record, out, out, spool, 1)

    with pytest.raises(AgentError) as caught:
        await fill()
    assert caught.value.stage is Stage.BUSY
    assert len(await session.client.list()) >= 20
    opened = await session.client.read("root", "/etc/passwd")
    os.close(opened.fd)
    assert (await session.client.list())[0].key == "k0"
    os.close(out)
    os.close(spool)


async def test_the_client_bounds_what_is_outstanding(box):
    session = await box.session()
    os.kill(box.pid, 19)
    try:
        tasks = [asyncio.create_task(session.client.list()) for _ in range(1100)]
        await asyncio.sleep(0.1)
        refused = [task for task in tasks if task.done()]
        assert len(refused) == 1100 - 1024
        tasks[500].cancel()
    finally:
        os.kill(box.pid, 18)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert sum(result == [] for result in results) == 1023


async def test_a_long_path_to_the_socket(box):
    deep = box.folder / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    (deep / "agent.sock").hardlink_to(box.path)
    box.path = deep / "agent.sock"
    session = await box.session()
    assert (await session.run("one", "echo far")).stdout == b"far\n"


async def test_nothing_is_lost_however_often_the_server_dies(box):
    """Commands are fed while connections end at random moments, with requests of all kinds under way."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    keys = [f"k{number}" for number in range(30)]
    wanted = {key: b"" for key in keys}
    spooled = dict.fromkeys(keys, 0)
    session = await box.session()
    for key in keys:
        await session.start(key, ["bash", "-c", "cat; echo err >&2; exit $((40 + 2))"], stdin=True)
    for _ in range(60):
        busy = []
        for key in rng.sample(keys, 10):
            data = rng.randbytes(rng.choice([1, 100, 70_000]))
            wanted[key] += data
            spooled[key] = box.feed(key, data)
            busy.append(asyncio.create_task(session.client.stdin(key, spooled[key], False)))
            busy.append(asyncio.create_task(session.client.list()))
            busy.append(asyncio.create_task(session.client.read("root", "/etc/passwd")))
        await asyncio.sleep(rng.choice([0, 0, 0.001, 0.005]))
        await session.client.close()
        for result in await asyncio.gather(*busy, return_exceptions=True):
            if not isinstance(result, BaseException) and hasattr(result, "fd"):
                os.close(result.fd)
        session = await box.session()
        known = {entry.key: entry for entry in await session.client.list()}
        assert set(known) == set(keys)
    for key in keys:
        await session.client.stdin(key, spooled[key], True)
    for key in keys:
        event = await session.exited(key)
        assert (event.status, event.stdout_length) == (42, len(wanted[key]))
        assert box.output(key, "out") == wanted[key]
        assert box.output(key, "err") == b"err\n"
        await session.client.ack(key)
    assert await session.client.list() == []
