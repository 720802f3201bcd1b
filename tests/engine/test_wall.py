"""The wall of nftables: when it is gone, when somebody changes it, and when a box begins too many connections."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess

import pytest
from structlog.testing import capture_logs

from devboxd.engine import network, wall
from devboxd.engine.netns import inside
from support.world import HOST, LAN, PORT, Listener, World, attached, reaches, run, wait_for

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces, which needs root")

TABLE = "inet devboxd_t"
DELETION = f"delete table {TABLE}"


def damage(world: World, command: str) -> None:
    run("nft", command, netns=world.host)


def rules(world: World) -> str:
    return wall.ruleset(world.instance, network.denied(world.settings), [])


def test_without_the_wall_a_box_reaches_nothing(world: World) -> None:
    """An operator deletes the table while no server looks: the routes of boxes lead nowhere."""
    boxes = world.box(), world.box()
    _, second = attached(world, *boxes)
    neighbour = Listener(boxes[1])
    connection = inside(boxes[0], lambda: socket.create_connection((LAN, PORT), 5))
    with connection, contextlib.closing(neighbour):
        damage(world, DELETION)
        before = len(world.on_host.peers), len(world.on_lan.peers)
        for source in ("198.18.4.0", "10.99.0.77"):
            run("ip", "address", "replace", f"{source}/32", "dev", "eth0", netns=boxes[0])
            for address in (HOST, "169.254.1.1", LAN, second.address):
                assert not reaches(boxes[0], address, source=source), (source, address)
            inside(boxes[0], lambda source=source: datagrams(source))
        assert (len(world.on_host.peers), len(world.on_lan.peers), neighbour.peers) == (*before, [])
        inside(world.host, lambda: say_on_lan())
        wait_for(lambda: b"seen" in world.on_lan.datagrams)
        assert (world.on_host.datagrams, world.on_lan.datagrams) == ([], [b"seen"])
        connection.sendall(b"waits for the wall")
        run("nft", "-f", "-", netns=world.host, text=rules(world))
        connection.settimeout(30)
        assert connection.recv(100) == b"waits for the wall"
    assert reaches(boxes[0], LAN, wait=5)


def datagrams(source: str) -> None:
    """Datagrams to every kind of address, also with the wall's own mark on them, which root of a box may set."""
    for mark in (0, wall.MARK):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sender.setsockopt(socket.SOL_SOCKET, 36, mark)  # SO_MARK
            sender.bind((source, 0))
            for address in (HOST, LAN, "10.99.0.255", "255.255.255.255", "224.0.0.1", "198.18.4.1"):
                with contextlib.suppress(OSError):
                    sender.sendto(b"from the box", (address, PORT))


def say_on_lan() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"seen", (LAN, PORT))


@pytest.mark.parametrize(
    "command",
    [
        DELETION,
        "flush ruleset",
        f"flush chain {TABLE} from_box",
        f"insert rule {TABLE} input accept",
        f"add element {TABLE} endpoints {{ {HOST} . {PORT} }}",
        f"delete element {TABLE} boxes {{ dbxt7 . 198.18.4.7 }}",
    ],
)
def test_a_wall_that_somebody_changes_is_put_up_again_and_logged(world: World, command: str) -> None:
    box = world.box()

    async def work() -> None:
        network = world.network()
        await network.open()
        await network.attach(0, box)
        before = listing(world)
        damage(world, command)
        assert listing(world) != before
        async with asyncio.timeout(30):
            while listing(world) != before:
                await asyncio.to_thread(os.sched_yield)
        assert await asyncio.to_thread(reaches, box, LAN, wait=5)
        assert not await asyncio.to_thread(reaches, box, HOST)
        await network.detach(0)
        await network.close()

    with capture_logs() as logs:
        world.on(work)
    assert any("changed the network wall" in entry["event"] for entry in logs), logs


def test_a_wall_that_is_deleted_as_soon_as_it_is_up_is_put_up_each_time(world: World) -> None:
    """Also when that happens before the guard has looked at what it put up: it knows what must be there."""
    times = 10

    async def work() -> None:
        network = world.network()
        await network.open()
        before = listing(world)
        async with asyncio.timeout(60):
            for _ in range(times):
                await asyncio.to_thread(damage, world, DELETION)
                while await asyncio.to_thread(listing, world) != before:
                    pass
        await network.close()

    with capture_logs() as logs:
        world.on(work)
    assert sum("changed the network wall" in entry["event"] for entry in logs) == times


def listing(world: World) -> str:
    """The rules and sets, without those that the kernel fills in, or nothing when the table is gone."""
    with contextlib.suppress(subprocess.CalledProcessError):
        text = run("nft", "list", "table", *TABLE.split(), netns=world.host)
        return re.sub(r"set (flows|fresh) \{.*?\n\t\}", "", text, flags=re.DOTALL)
    return ""


def test_changes_of_other_tables_are_nobodys_business(world: World) -> None:
    async def work() -> None:
        network = world.network()
        await network.open()
        before = run("nft", "-a", "list", "table", *TABLE.split(), netns=world.host)
        damage(world, "add table inet other")
        damage(world, f"add element {TABLE} endpoints {{ {HOST} . {PORT} }}")
        async with asyncio.timeout(30):
            while HOST in listing(world):
                await asyncio.to_thread(os.sched_yield)
        assert run("nft", "-a", "list", "table", *TABLE.split(), netns=world.host) != before
        assert "inet other" in run("nft", "list", "tables", netns=world.host)
        await network.close()

    with capture_logs() as logs:
        world.on(work)
    assert len([entry for entry in logs if "changed" in entry["event"]]) == 1, logs


# connections


AT_ONCE = f"ct count over {wall.MOST_FLOWS}"
FOR_LONG = f"limit rate over {wall.NEW_FLOWS_PER_SECOND}/second burst {wall.MOST_FLOWS} packets"


@pytest.mark.parametrize(
    ("bound", "far"),
    [(FOR_LONG, "limit rate over 1000000/second burst 1000000 packets"), (AT_ONCE, "ct count over 1000000")],
)
def test_a_box_cannot_fill_the_hosts_table_of_connections(world: World, bound: str, far: str) -> None:
    """120,000 flows of one box, with one of the two bounds out of the way: each holds alone."""
    box, neighbour = world.box(), world.box()
    attached(world, box, neighbour)
    assert bound in rules(world)
    run("nft", "-f", "-", netns=world.host, text=rules(world).replace(bound, far))
    inside(box, lambda: begin_flows(120_000))
    count = int(run("sysctl", "-n", "net.netfilter.nf_conntrack_count", netns=world.host))
    assert wall.MOST_FLOWS // 2 < count < 2 * wall.MOST_FLOWS
    assert reaches(neighbour, LAN, wait=5)


def begin_flows(number: int) -> None:
    """Datagrams from a few ports to every port of the LAN machine: each pair is a connection to the kernel."""
    sent = 0
    while sent < number:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for port in range(1024, 61024):
                with contextlib.suppress(OSError):
                    sender.sendto(b"", (LAN, port))
            sent += 60_000
