"""The wall around the boxes' network: one nftables table per server, and the guard that keeps it in force.

The wall fails closed. The routes that lead to boxes lie in a routing table that only packets with a mark meet, and
nobody but the wall sets the mark: on what boxes send, and on what is meant for them. A packet of a box without the mark
has a sender to whom no way leads, and the kernel drops it as forged (rp_filter) before it reaches this host or any
other. So without the wall boxes reach nothing, until the guard has put it up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import json
import socket
from collections.abc import Iterable
from typing import Any

import structlog

from devboxd.concurrency.tasks import Tasks
from devboxd.concurrency.threads import finished
from devboxd.engine.base import EngineError
from devboxd.engine.instance import Instance
from devboxd.engine.nettools import ip, nft, run

_log = structlog.get_logger(__name__)

PREFIX = "dbx"
"""All links of all servers begin with this; the instance's id and the slot's index follow."""
MOST_FLOWS = 4096
"""Most connections of a box that connection tracking follows at once."""
NEW_FLOWS_PER_SECOND = 100
"""How many new ones a box may begin for long, after as many at once as it may have: ended ones linger two minutes."""
MARK = 0x08000000
"""What the wall sets on packets from and to boxes. Nothing sent by a box has it: marks end with a network namespace."""
_RULE_ORDER = 600
_TABLES = 0xDB00
_COUNTERS = ("flows", "fresh")
"""The sets of the table that the kernel fills by itself."""
_NETFILTER, _CHANGES_OF_NFTABLES = 12, 1 << 6
_MESSAGE_BYTES = 1 << 16
_TOGETHER_SECONDS = 0.1
_AGAIN_SECONDS = 1.0


def table(instance: Instance) -> str:
    """The name of the instance's nftables table."""
    return f"devboxd_{instance.id}"


def routes(instance: Instance) -> int:
    """The routing table in which the routes to the instance's boxes lie."""
    return _TABLES + ord(instance.id[0])


def ruleset(
    instance: Instance,
    forbidden: Iterable[ipaddress.IPv4Network],
    allowed: Iterable[tuple[ipaddress.IPv4Address, int]],
) -> str:
    """The wall as text for `nft -f`, which replaces an older one of this instance in one transaction."""
    boxes = ", ".join(f'"{PREFIX}{instance.id}{n}" . {instance.address(n)}' for n in range(instance.slots))
    exceptions = ", ".join(f"{address} . {port}" for address, port in allowed)
    nowhere = ", ".join(map(str, [instance.subnet, *forbidden]))
    return f"""{removal(instance)}
table inet {table(instance)} {{
  set boxes {{ type ifname . ipv4_addr; elements = {{ {boxes} }} }}
  set denied {{ type ipv4_addr; flags interval; auto-merge; elements = {{ {nowhere} }} }}
  set endpoints {{ type ipv4_addr . inet_service; {f"elements = {{ {exceptions} }}" if exceptions else ""} }}
  set flows {{ type ipv4_addr; flags dynamic; size {instance.slots}; }}
  set fresh {{ type ipv4_addr; flags dynamic; size {instance.slots}; }}
{_chains(instance)}
}}
"""


def _chains(instance: Instance) -> str:
    links = f'iifname "{PREFIX}{instance.id}*"'
    back = f'oifname "{PREFIX}{instance.id}*"'
    mark = f"meta mark set mark or {MARK:#x}"
    new = f"{links} ct state new"
    return f"""
  # Before connection tracking and before any address translation of other programs.
  chain prerouting {{
    type filter hook prerouting priority raw - 10; policy accept
    {links} jump from_box
  }}
  chain from_box {{
    {mark}
    meta nfproto != ipv4 drop
    iifname . ip saddr != @boxes drop
    ip daddr . tcp dport @endpoints accept
    ip daddr @denied drop
    fib daddr type {{ local, broadcast, anycast, multicast }} drop
  }}
  # What is meant for boxes, once answers have their true address again, and what this host itself answers them.
  chain returning {{
    type filter hook prerouting priority dstnat + 10; policy accept
    ip daddr {instance.subnet} {mark}
  }}
  chain output {{
    type route hook output priority mangle; policy accept
    ip daddr {instance.subnet} {mark}
  }}
  # Again after address translation: what looked like another host may lead to this one now.
  chain input {{
    type filter hook input priority filter - 10; policy accept
    {links} ip daddr . tcp dport @endpoints accept
    {links} drop
  }}
  chain forward {{
    type filter hook forward priority filter - 10; policy accept
    tcp flags syn {links} tcp option maxseg size set rt mtu
    tcp flags syn {back} tcp option maxseg size set rt mtu
    {links} oifname "{PREFIX}*" drop
    # What belongs to no connection would leave with the box's own address, because nothing translates it.
    {links} ct state invalid drop
    # All boxes share the host's table of connections: one must not fill it.
    {new} update @fresh {{ ip saddr limit rate over {NEW_FLOWS_PER_SECOND}/second burst {MOST_FLOWS} packets }} drop
    {new} add @flows {{ ip saddr ct count over {MOST_FLOWS} }} drop
    {links} ip daddr . tcp dport @endpoints accept
    {links} ip daddr @denied drop
    {back} ct state established,related accept
    {back} drop
  }}
  chain postrouting {{
    type nat hook postrouting priority srcnat; policy accept
    ip saddr {instance.subnet} oifname != "{PREFIX}*" masquerade
  }}"""


def removal(instance: Instance) -> str:
    """Delete the table of an instance; adding it first makes that succeed when there is none."""
    return f"table inet {table(instance)} {{}}\ndelete table inet {table(instance)}\n"


class Wall:
    """The wall of one instance, in force and watched from `open` to `close`."""

    def __init__(self, instance: Instance, rules: str) -> None:
        """`rules` is what `ruleset` gives."""
        self._instance = instance
        self._rules = rules
        self._inside: list[Any] | None = None
        self._doubtful = False
        self._tasks = Tasks()
        self._socket: socket.socket | None = None

    async def open(self) -> None:
        """Put the wall up and begin to watch it. Raises EngineError when the machine refuses."""
        self._socket = await finished(_listen)
        await finished(lambda: _lead_nowhere(self._instance))
        await self._put_up()
        self._inside = await finished(self._listing)
        if self._inside is None:
            raise EngineError("cannot keep the network wall up: another program deletes it; stop that one first")
        self._tasks.start(self._watch(self._socket), "guard of the network wall")

    async def close(self, *, remove: bool) -> None:
        """Stop watching; the wall stays, for the boxes that live on, unless it is to be removed."""
        await self._tasks.close()
        if self._socket is not None:
            self._socket.close()
        if remove:
            await finished(lambda: _take_down(self._instance))

    async def _put_up(self) -> None:
        await finished(lambda: nft(self._rules))

    async def _watch(self, changes: socket.socket) -> None:
        while True:
            try:
                await self._changed(changes)
                self._doubtful = False
                if await finished(self._listing) != self._inside:
                    _log.warning("another program changed the network wall; putting it up again")
                    await self._put_up()
                    _log.warning("the network wall is up again")
                await asyncio.sleep(_TOGETHER_SECONDS)  # what changes in one go is looked at once
            except EngineError as error:
                _log.error("cannot put the network wall up again; boxes reach nothing meanwhile", reason=str(error))
                self._doubtful = True
                await asyncio.sleep(_AGAIN_SECONDS)

    async def _changed(self, changes: socket.socket) -> None:
        """Return when the table may have been changed: the kernel tells of each change that anybody makes."""
        name = table(self._instance).encode() + b"\0"
        told = self._doubtful
        while not told:
            try:
                told = name in await asyncio.get_running_loop().sock_recv(changes, _MESSAGE_BYTES)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                told = True  # there was more than fits into the socket
        _drain(changes)

    def _listing(self) -> list[Any] | None:
        """What the kernel has of the table, but for what it fills in by itself; None when it has nothing.

        The same each time that the wall is put up: what others change in that very moment must not count as its own.
        """
        try:
            found: list[Any] = json.loads(run("nft", "-j", "list", "table", "inet", table(self._instance)))["nftables"]
        except EngineError:
            return None
        for counter in (item["set"] for item in found if item.get("set", {}).get("name") in _COUNTERS):
            counter.pop("elem", None)
        for thing in (thing for item in found for thing in item.values()):
            thing.pop("handle", None)
        return found


def _listen() -> socket.socket:
    """A socket on which the kernel tells of every change of nftables in this network namespace."""
    listening = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETFILTER)
    try:
        listening.bind((0, _CHANGES_OF_NFTABLES))
    except OSError as error:
        listening.close()
        raise EngineError(f"cannot watch the network wall: {error}; use a kernel with nf_tables") from error
    return listening


def _drain(changes: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            try:
                changes.recv(_MESSAGE_BYTES)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise


def _rule(instance: Instance) -> str:
    return f"to {instance.subnet} fwmark {MARK:#x}/{MARK:#x} lookup {routes(instance)}"


def _lead_nowhere(instance: Instance) -> None:
    """Let packets with the mark find the boxes, and all others end on this host's loopback."""
    ip(f"route replace {instance.subnet} dev lo")
    if _rule(instance) not in run("ip", "rule", "list"):
        ip(f"rule add priority {_RULE_ORDER} {_rule(instance)}")


def _take_down(instance: Instance) -> None:
    nft(removal(instance))
    if _rule(instance) in run("ip", "rule", "list"):
        ip(f"rule delete priority {_RULE_ORDER} {_rule(instance)}")
    if str(instance.subnet) in run("ip", "route", "list", "dev", "lo"):
        ip(f"route delete {instance.subnet} dev lo")
