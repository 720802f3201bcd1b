"""The wall around boxes, with real namespaces: a host, a machine on its LAN, and boxes, all apart from this machine."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from devboxd.config import Settings
from devboxd.engine import dns
from devboxd.engine.base import EngineError
from devboxd.engine.instance import Instance
from devboxd.engine.netns import inside
from devboxd.engine.network import Link, Network
from devboxd.errors import SetupError
from support.world import HOST, HOST6, LAN, METADATA, PORT, Listener, World, attached, reaches, run, wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces, which needs root")


def test_a_box_reaches_the_lan_from_the_hosts_address(world: World) -> None:
    box = world.box()
    (link,) = attached(world, box)
    assert link == Link(0, "dbxt0", "198.18.4.0", "169.254.1.1")
    assert reaches(box, LAN, wait=5)
    assert world.on_lan.peers == [HOST]


def test_a_box_does_not_reach_its_host(world: World) -> None:
    box = world.box()
    attached(world, box)
    run("ip", "address", "add", "192.168.77.1/32", "dev", "lo", netns=world.host)
    assert reaches(world.host, HOST, wait=5)
    before = len(world.on_host.peers)
    run("ip", "route", "replace", "127.0.0.0/8", "via", "169.254.1.1", "table", "local", netns=box)
    for address in (HOST, "192.168.77.1", "169.254.1.1", "127.0.0.1"):
        assert not reaches(box, address), address
    assert len(world.on_host.peers) == before


def test_a_box_does_not_reach_its_host_by_datagrams_or_broadcast(world: World) -> None:
    box = world.box()
    attached(world, box)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            for address in (HOST, "10.99.0.255", "255.255.255.255", "224.0.0.251"):
                with contextlib.suppress(OSError):
                    sender.sendto(b"from the box", (address, PORT))
            sender.sendto(b"allowed", (LAN, PORT))

    inside(box, send)
    wait_for(lambda: b"allowed" in world.on_lan.datagrams)
    assert world.on_host.datagrams == []
    assert world.on_lan.datagrams == [b"allowed"]


def test_a_box_has_no_ipv6_to_the_host_even_when_it_makes_addresses(world: World) -> None:
    box = world.box()
    attached(world, box)
    run("sysctl", "-qw", "net.ipv6.conf.eth0.disable_ipv6=0", netns=box)
    run("ip", "address", "add", "fd99::77/64", "dev", "eth0", "nodad", netns=box)
    run("ip", "neighbour", "replace", HOST6, "lladdr", "ee:ee:ee:ee:ee:ee", "dev", "eth0", netns=box)
    assert reaches(world.host, HOST6, wait=5)
    before = len(world.on_host.peers)
    assert not reaches(box, HOST6)
    assert not reaches(box, "fe80::ecee:eeff:feee:eeee%eth0")
    assert len(world.on_host.peers) == before
    shown = run("ip", "-6", "address", "show", "dev", "dbxt0", netns=world.host)
    assert shown == ""


def test_boxes_have_ipv6_on_their_loopback(world: World) -> None:
    box = world.box()
    attached(world, box)
    inside(box, lambda: socket.create_server(("::1", 0), family=socket.AF_INET6).close())


def test_boxes_do_not_reach_each_other(world: World) -> None:
    boxes = world.box(), world.box()
    first, second = attached(world, *boxes)
    listener = Listener(boxes[1])
    try:
        assert reaches(boxes[1], second.address, wait=5)
        assert not reaches(boxes[0], second.address)
        assert not reaches(boxes[0], second.address, source=first.address)
        assert listener.peers == [second.address]
    finally:
        listener.close()


def test_the_lan_does_not_reach_boxes(world: World) -> None:
    box = world.box()
    (link,) = attached(world, box)
    listener = Listener(box)
    try:
        assert not reaches(world.lan, link.address)
        assert listener.peers == []
    finally:
        listener.close()


@pytest.mark.parametrize("address", METADATA)
def test_a_box_does_not_reach_metadata(world: World, address: str) -> None:
    box = world.box()
    attached(world, box)
    assert reaches(world.host, address, wait=5)
    assert not reaches(box, address)


def test_denied_networks_are_out_of_reach(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    world = World(tmp_path, stack, deny_cidrs=("10.99.0.0/24", "fd99::/64"))
    box = world.box()
    attached(world, box)
    assert not reaches(box, LAN)


def test_allowed_endpoints_are_exceptions_by_address_and_port(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    world = World(
        tmp_path, stack, deny_cidrs=("10.99.0.0/24",), allow_endpoints=(f"{HOST}:{PORT}", f"{METADATA[0]}:{PORT}")
    )
    box = world.box()
    attached(world, box)
    other = inside(world.host, lambda: socket.create_server(("", PORT + 1)))
    with other:
        assert reaches(box, HOST, wait=5)
        assert reaches(box, METADATA[0], wait=5)
        assert not reaches(box, HOST, PORT + 1)
        assert not reaches(box, LAN)


def test_a_box_cannot_take_another_source_address(world: World) -> None:
    boxes = world.box(), world.box()
    _, second = attached(world, *boxes)
    for address in (second.address, "198.18.4.9", "10.99.0.50", HOST):
        run("ip", "address", "add", f"{address}/32", "dev", "eth0", netns=boxes[0])

        def send(address: str = address) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.bind((address, 0))
                sender.sendto(b"forged", (LAN, PORT))

        inside(boxes[0], send)
        assert not reaches(boxes[0], LAN, source=address)
    assert reaches(boxes[0], LAN, source="198.18.4.0", wait=5)
    assert world.on_lan.peers == [HOST]
    assert world.on_lan.datagrams == []


def test_the_host_answers_no_arp_of_boxes(world: World) -> None:
    box = world.box()
    (link,) = attached(world, box)

    def ask() -> bool:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as raw:
            raw.bind(("eth0", 0x0806))
            raw.settimeout(0.4)
            mine = bytes.fromhex("020000000002")
            question = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mine + socket.inet_aton(link.address)
            raw.send(b"\xff" * 6 + mine + b"\x08\x06" + question + b"\0" * 6 + socket.inet_aton(HOST))
            try:
                return b"\0\x02" in raw.recv(100)[20:22]
            except TimeoutError:
                return False

    assert not inside(box, ask)


def test_address_translation_of_other_programs_opens_no_way_to_the_host(world: World) -> None:
    """A rule that leads a port of a far address to this host must not lead boxes to it."""
    box = world.box()
    attached(world, box)
    rule = "table ip other { chain c { type nat hook prerouting priority dstnat; ip daddr 203.0.113.1 dnat to %s; }; }"
    run("nft", rule % HOST, netns=world.host)
    assert reaches(world.lan, "203.0.113.1", wait=5)
    before = len(world.on_host.peers)
    assert not reaches(box, "203.0.113.1")
    assert len(world.on_host.peers) == before


def test_unprivileged_ping_and_low_ports(world: World) -> None:
    box = world.box()
    attached(world, box)
    assert run("sysctl", "-n", "net.ipv4.ping_group_range", netns=box).split() == ["0", "2147483647"]
    assert run("sysctl", "-n", "net.ipv4.ip_unprivileged_port_start", netns=box).strip() == "0"


def test_connections_survive_a_restarted_server_and_other_links_go(world: World) -> None:
    boxes = world.box(), world.box()
    attached(world, *boxes)
    connection = inside(boxes[0], lambda: socket.create_connection((LAN, PORT), 5))
    with connection:
        connection.sendall(b"before")
        assert connection.recv(10) == b"before"

        async def again() -> None:
            network = world.network()
            await network.open()
            await network.adopt({0: boxes[0]})
            await network.close()

        world.on(again)
        connection.sendall(b"after")
        assert connection.recv(10) == b"after"
    assert not reaches(boxes[1], LAN)
    assert reaches(boxes[0], LAN, wait=5)
    assert not reaches(boxes[0], HOST)


def test_detach_and_close_leave_nothing(world: World) -> None:
    box = world.box()

    async def work() -> None:
        network = world.network()
        await network.open()
        await network.attach(3, box)
        await network.attach(3, box)
        await network.detach(3)
        await network.detach(3)
        await network.close()

    world.on(work)
    links = {name for _, name in inside(world.host, socket.if_nameindex)}
    assert links == {"lo", "up0"}
    assert run("nft", "list", "tables", netns=world.host) == ""


def test_a_namespace_that_does_not_exist_is_explained(world: World, tmp_path: Path) -> None:
    async def work() -> None:
        network = world.network()
        await network.open()
        await network.attach(0, tmp_path / "missing")

    with pytest.raises(EngineError, match="cannot set up the network"):
        world.on(work)
    assert {name for _, name in inside(world.host, socket.if_nameindex)} == {"lo", "up0"}


def test_resolvers_out_of_reach_are_asked_by_the_server(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    world = World(tmp_path, stack, dns_servers=(METADATA[0],))
    box = world.box()

    async def work() -> str:
        network = world.network()
        await network.open()
        text = network.resolv_conf(await network.attach(0, box))
        await network.close()
        restarted = world.network()
        await restarted.open()
        await restarted.adopt({0: box})
        assert await asyncio.to_thread(listens, box)
        await restarted.close()
        return text

    text = world.on(work)
    assert text.startswith(f"nameserver {dns.LISTEN}\n")
    assert not listens(box)


def listens(box: Path) -> bool:
    def connect() -> bool:
        try:
            socket.create_connection((dns.LISTEN, dns.PORT), 2).close()
        except ConnectionRefusedError:
            return False
        return True

    return inside(box, connect)


def test_resolvers_within_reach_are_named(world: World) -> None:
    box = world.box()

    async def work() -> str:
        network = world.network()
        await network.open()
        return network.resolv_conf(await network.attach(0, box))

    assert world.on(work).startswith(f"nameserver {LAN}\n")


@pytest.mark.parametrize(
    "settings",
    [
        {"deny_cidrs": ("nonsense",)},
        {"allow_endpoints": ("127.0.0.1:80",)},
        {"allow_endpoints": ("192.0.2.1",)},
        {"allow_endpoints": ("192.0.2.1:99999",)},
        {"dns_servers": ("resolver",)},
    ],
)
def test_settings_of_the_wrong_form_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    instance = Instance("t", tmp_path, tmp_path, ipaddress.IPv4Network("198.18.4.0/22"), 1 << 29)
    with pytest.raises(SetupError, match="cannot use"):
        Network(Settings(**settings), instance)
