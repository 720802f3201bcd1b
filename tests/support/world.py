"""A small world of network namespaces: a host, a machine on its LAN that also plays the metadata services, boxes."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from devboxd.config import Settings
from devboxd.engine.instance import Instance
from devboxd.engine.netns import inside
from devboxd.engine.network import Link, Network

HOST, LAN = "10.99.0.1", "10.99.0.2"
HOST6, LAN6 = "fd99::1", "fd99::2"
METADATA = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "168.63.129.16", "192.0.0.192")
PORT = 8000
_numbers = itertools.count()


def run(*command: str, netns: Path | None = None, text: str | None = None) -> str:
    """The output of a program in a network namespace; it must succeed."""
    prefix = ["nsenter", f"--net={netns}"] if netns else []
    return subprocess.run([*prefix, *command], input=text, check=True, capture_output=True, text=True).stdout


@contextlib.contextmanager
def namespace() -> Iterator[Path]:
    name = f"devboxd-test-{os.getpid()}-{next(_numbers)}"
    run("ip", "netns", "add", name)
    try:
        yield Path("/run/netns") / name
    finally:
        run("ip", "netns", "delete", name)


class Listener:
    """Accepts TCP and UDP on every address of a namespace, answers each line, and counts who came."""

    def __init__(self, netns: Path) -> None:
        self.peers: list[str] = []
        self.datagrams: list[bytes] = []
        self._sockets: list[socket.socket] = inside(netns, self._make)
        for made in self._sockets:
            work = self._accept if made.type == socket.SOCK_STREAM else self._receive
            threading.Thread(target=work, args=(made,), daemon=True).start()

    def close(self) -> None:
        for made in self._sockets:
            with contextlib.suppress(OSError):
                made.shutdown(socket.SHUT_RDWR)
            made.close()

    def _make(self) -> list[socket.socket]:
        stream = socket.create_server(("", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.bind(("0.0.0.0", PORT))
        return [stream, datagrams]

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, peer = listening.accept()
                self.peers.append(peer[0].removeprefix("::ffff:"))
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _receive(self, receiving: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := receiving.recv(2048):
                self.datagrams.append(data)

    @staticmethod
    def _echo(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1024):
                connection.sendall(data)


class World:
    """A host with a network of its own, a LAN machine that also plays the metadata services, and a Network."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack, **settings: Any) -> None:
        self._stack = stack
        self.host = stack.enter_context(namespace())
        self.lan = stack.enter_context(namespace())
        self._wire()
        self.on_lan, self.on_host = Listener(self.lan), Listener(self.host)
        stack.callback(self.on_lan.close)
        stack.callback(self.on_host.close)
        self.instance = Instance("t", folder, folder, ipaddress.IPv4Network("198.18.4.0/22"), 1 << 29)
        self.settings = Settings(**{"dns_servers": (LAN,), **settings})

    def box(self) -> Path:
        return self._stack.enter_context(namespace())

    def network(self) -> Network:
        return Network(self.settings, self.instance)

    def on(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Run a coroutine as the server of this host."""
        return inside(self.host, lambda: asyncio.run(work()))

    def _wire(self) -> None:
        lan = str(self.lan)
        run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "eth0", "netns", lan, netns=self.host)
        for netns, device, address, address6 in (
            (self.host, "up0", HOST, HOST6),
            (self.lan, "eth0", LAN, LAN6),
        ):
            run("ip", "link", "set", "lo", "up", netns=netns)
            run("ip", "address", "add", f"{address}/24", "dev", device, netns=netns)
            run("ip", "address", "add", f"{address6}/64", "dev", device, "nodad", netns=netns)
            run("ip", "link", "set", device, "up", netns=netns)
        run("ip", "route", "add", "default", "via", LAN, netns=self.host)
        run("ip", "route", "add", "default", "via", HOST, netns=self.lan)
        for address in METADATA:
            run("ip", "address", "add", f"{address}/32", "dev", "lo", netns=self.lan)


def reaches(netns: Path, address: str, port: int = PORT, source: str | None = None, wait: float = 0.4) -> bool:
    """Whether a connection from the namespace is answered."""

    def connect() -> bool:
        origin = (source, 0) if source else None
        try:
            with socket.create_connection((address, port), wait, origin) as connection:
                connection.sendall(b"x")
                return connection.recv(1) == b"x"
        except OSError:
            return False

    return inside(netns, connect)


def attached(world: World, *boxes: Path) -> list[Link]:
    async def work() -> list[Link]:
        network = world.network()
        await network.open()
        return [await network.attach(index, box) for index, box in enumerate(boxes)]

    return world.on(work)


def wait_for(condition: Callable[[], bool]) -> None:
    """Returns as soon as another thread has seen what was sent; a slow machine gets ten seconds."""
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    raise AssertionError("nothing arrived within 10 s")
