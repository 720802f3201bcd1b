"""The forwarder of a box's DNS, with real sockets in a real namespace."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from devboxd.engine import dns
from devboxd.engine.netns import inside
from support.server import Server

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces, which needs root")
_numbers = itertools.count()


@pytest.fixture
def netns() -> Iterator[Path]:
    """An empty namespace with its loopback up."""
    name = f"devboxd-dns-{os.getpid()}-{next(_numbers)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield Path("/run/netns") / name
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


class Resolver(asyncio.DatagramProtocol):
    """A resolver on the host's loopback: it answers with the query and a mark, when it is told to."""

    def __init__(self, mark: bytes = b"!", silent: bool = False) -> None:
        self.mark, self.silent, self.seen = mark, silent, 0
        self.arrived = asyncio.Condition()
        self.port = 0

    async def open(self) -> Resolver:
        loop = asyncio.get_running_loop()
        self._datagrams, _ = await loop.create_datagram_endpoint(lambda: self, local_addr=("127.0.0.1", 0))
        self.port = self._datagrams.get_extra_info("sockname")[1]
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        return self

    def close(self) -> None:
        self._datagrams.close()
        self._server.close()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self.seen += 1
        if not self.silent:
            self._datagrams.sendto(b"\0\0" + data[2:] + b"forged", addr)
            self._datagrams.sendto(data + self.mark, addr)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        (length,) = struct.unpack("!H", await reader.readexactly(2))
        answer = await reader.readexactly(length) + self.mark * 20000
        writer.write(struct.pack("!H", len(answer)) + answer)
        await writer.drain()
        writer.close()


def query(number: int = 1) -> bytes:
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + b"\7example\4test\0\0\1\0\1"


def by_datagram(netns: Path, text: bytes, wait: float = 5) -> bytes | None:
    def ask() -> bytes | None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            asking.settimeout(wait)
            asking.sendto(text, (dns.LISTEN, dns.PORT))
            try:
                return asking.recv(65536)
            except TimeoutError:
                return None

    return inside(netns, ask)


def by_stream(netns: Path, texts: list[bytes]) -> list[bytes]:
    def ask() -> list[bytes]:
        answers = []
        with socket.create_connection((dns.LISTEN, dns.PORT), 5) as connection, connection.makefile("rb") as reading:
            for text in texts:
                connection.sendall(struct.pack("!H", len(text)) + text)
                head = reading.read(2)
                answers.append(reading.read(struct.unpack("!H", head)[0]) if head else b"")
        return answers

    return inside(netns, ask)


def forwarding(netns: Path, work: Callable[[dns.Forwarder, Resolver], Awaitable[None]], **how: bool) -> None:
    async def main() -> None:
        resolver = await Resolver(**how).open()
        forwarder = dns.Forwarder(lambda: ("127.0.0.1",), upstream_port=resolver.port)
        await forwarder.open(netns)
        try:
            await work(forwarder, resolver)
        finally:
            await forwarder.close()
            await forwarder.close()
            resolver.close()

    asyncio.run(main())


@needs_root
def test_datagrams_are_answered_and_forged_ids_are_not_believed(netns: Path) -> None:
    async def work(forwarder: dns.Forwarder, resolver: Resolver) -> None:
        answers = await asyncio.gather(*(asyncio.to_thread(by_datagram, netns, query(n)) for n in range(1, 9)))
        assert answers == [query(n) + b"!" for n in range(1, 9)]

    forwarding(netns, work)


@needs_root
def test_long_answers_come_by_stream_and_one_connection_asks_often(netns: Path) -> None:
    async def work(forwarder: dns.Forwarder, resolver: Resolver) -> None:
        texts = [query(1), query(2)]
        assert await asyncio.to_thread(by_stream, netns, texts) == [text + b"!" * 20000 for text in texts]

    forwarding(netns, work)


@needs_root
def test_nonsense_is_not_passed_on(netns: Path) -> None:
    async def work(forwarder: dns.Forwarder, resolver: Resolver) -> None:
        assert await asyncio.to_thread(by_datagram, netns, b"short", 0.3) is None
        assert await asyncio.to_thread(by_datagram, netns, b"x" * 5000, 0.3) is None
        assert await asyncio.to_thread(by_stream, netns, [b"short"]) == [b""]
        assert resolver.seen == 0

    forwarding(netns, work)


@needs_root
def test_waiting_queries_are_bounded(netns: Path) -> None:
    def flood() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for number in range(dns.MAX_QUERIES * 3):
                asking.sendto(query(number), (dns.LISTEN, dns.PORT))

    async def work(forwarder: dns.Forwarder, resolver: Resolver) -> None:
        for _ in range(3):
            await asyncio.to_thread(inside, netns, flood)
        assert await asyncio.to_thread(by_datagram, netns, query(), 0.3) is None
        assert 0 < resolver.seen <= dns.MAX_QUERIES

    forwarding(netns, work, silent=True)


@needs_root
@pytest.mark.parametrize("way", ["datagrams", "connections", "one connection"])
def test_a_flood_is_read_at_a_pace(netns: Path, way: str) -> None:
    seconds = 1.5

    def flood() -> None:
        end = time.monotonic() + seconds
        address = (dns.LISTEN, dns.PORT)
        if way == "datagrams":
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
                while time.monotonic() < end:
                    asking.sendto(query(), address)
        elif way == "connections":
            while time.monotonic() < end:
                with socket.create_connection(address, 5) as asking:
                    asking.sendall(struct.pack("!H", len(query())) + query())
        else:
            with socket.create_connection(address, 5) as asking, contextlib.suppress(TimeoutError):
                asking.settimeout(seconds)
                for _ in range(20_000):
                    asking.sendall(struct.pack("!H", len(query())) + query())
                    if asking.recv(65536) == b"" or time.monotonic() > end:
                        break

    async def work(forwarder: dns.Forwarder, resolver: Resolver) -> None:
        begun = time.monotonic()
        await asyncio.to_thread(inside, netns, flood)
        assert resolver.seen <= dns.BURST + dns.EACH_SECOND * (time.monotonic() - begun) + dns.MAX_CONNECTIONS
        for _ in range(20):
            if await asyncio.to_thread(by_datagram, netns, query(7), 1) == query(7) + b"!":
                return
        raise AssertionError("no query is answered any more")

    forwarding(netns, work)


@needs_root
def test_connections_are_bounded(netns: Path) -> None:
    def connect() -> list[socket.socket]:
        return [socket.create_connection((dns.LISTEN, dns.PORT), 5) for _ in range(dns.MAX_CONNECTIONS + 1)]

    async def work(forwarder: dns.Forwarder, resolver: Resolver) -> None:
        connections = await asyncio.to_thread(inside, netns, connect)
        assert await asyncio.to_thread(ended, connections[-1])
        for connection in connections:
            connection.close()

    forwarding(netns, work)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


@needs_root
def test_the_next_resolver_answers_when_the_first_refuses(netns: Path) -> None:
    async def main() -> None:
        resolver = await Resolver().open()
        forwarder = dns.Forwarder(lambda: ("127.0.0.2", "127.0.0.1"), upstream_port=resolver.port)
        await forwarder.open(netns)
        try:
            assert await asyncio.to_thread(by_datagram, netns, query()) == query() + b"!"
        finally:
            await forwarder.close()
            resolver.close()

    asyncio.run(main())


@needs_root
def test_a_port_that_is_taken_is_an_error(netns: Path) -> None:
    async def main() -> None:
        first, second = (dns.Forwarder(lambda: ()) for _ in range(2))
        await first.open(netns)
        with pytest.raises(OSError, match="in use"):
            await second.open(netns)
        await first.close()

    asyncio.run(main())


def test_resolv_conf_is_read_with_care(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    path.write_text(
        "# nameserver 192.0.2.9\nnameserver 192.0.2.1\nnameserver nonsense\nnameserver fe80::1%eth0\n"
        "search one.test two.test\noptions edns0 trust-ad ndots:2\nnameserver 192.0.2.2\nnameserver 192.0.2.3\n"
    )
    found = dns.read_resolv_conf(path)
    assert found.servers == ("192.0.2.1", "fe80::1%eth0", "192.0.2.2")
    assert found.rest == ("search one.test two.test", "options edns0 ndots:2")
    assert dns.read_resolv_conf(tmp_path / "missing").servers == ("127.0.0.1",)


def test_local_addresses_are_recognised() -> None:
    assert dns.is_local("127.0.0.53")
    assert not dns.is_local("192.0.2.250")
    assert not dns.is_local("2001:db8::1")


@pytest.mark.box
def test_a_devbox_finds_names_through_it() -> None:
    """Where the host's resolver is local, so that no devbox reaches it."""
    local = "127.0.0.77"
    server = Server(dns_servers=local)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver, contextlib.ExitStack() as stack:
        resolver.bind((local, dns.PORT))
        stack.callback(server.stop)
        api = stack.enter_context(server.start().api())
        answering = threading.Thread(target=answer_each, args=(resolver,))
        answering.start()
        stack.callback(answering.join)
        stack.callback(resolver.sendto, b"", (local, dns.PORT))
        box = api.create()
        assert api.output(box, "grep nameserver /etc/resolv.conf") == f"nameserver {dns.LISTEN}\n"
        assert api.output(box, "getent ahostsv4 some.test other.test | cut -d' ' -f1 | uniq") == "192.0.2.7\n"


def answer_each(resolver: socket.socket) -> None:
    """192.0.2.7 to each question for an address of IPv4, nothing to others, until an empty datagram comes."""
    record = b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + socket.inet_aton("192.0.2.7")
    while (came := resolver.recvfrom(4096))[0]:
        asked, sender = came
        question = asked[12 : asked.index(0, 12) + 5]
        found = question[-4:] == b"\0\1\0\1"
        resolver.sendto(asked[:2] + struct.pack("!5H", 0x8180, 1, found, 0, 0) + question + record * found, sender)
