"""The network of boxes: each in a namespace of its own with one routed link to the host, and a wall in nftables.

Nothing is bridged. A box has one address, one neighbour (a gateway address that belongs to nobody) and a default route
to it; both sides know the other's hardware address from the start, so no ARP is needed and the host's end has none.
Boxes have no IPv6 but on their loopback. One nftables table per server holds the whole wall for all slots at once (see
`wall`): which address may come out of which link, and where it may go. So making a box changes no rule, and a restarted
server puts the same rules in force in one transaction while connections go on.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from devboxd.concurrency.threads import finished
from devboxd.config import Settings
from devboxd.engine import dns, figures, wall
from devboxd.engine.base import EngineError
from devboxd.engine.instance import Instance
from devboxd.engine.netns import inside
from devboxd.engine.nettools import ip
from devboxd.errors import SetupError
from devboxd.path_errors import reason

GATEWAY = "169.254.1.1"
DENIED = ("169.254.0.0/16", "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32")
"""Where the metadata services of clouds live; no box ever reaches them."""
_MAC = "02:00:00:00:00:02"
"""Of both ends of a link: without ARP the host sends to its own end's address, which is then the box's."""
_SYS = Path("/proc/sys/net")


@dataclass(frozen=True)
class Link:
    """A box's way out: the host's end `interface`, the box's only address, and its gateway."""

    index: int
    interface: str
    address: str
    gateway: str


class Network:
    """All links of one server. Methods on different slots may run at the same time, on one slot one after the other."""

    def __init__(self, settings: Settings, instance: Instance) -> None:
        """Raises SetupError when deny_cidrs, allow_endpoints or dns_servers do not have the form that they need."""
        self._settings = settings
        self._instance = instance
        self._prefix = wall.PREFIX + instance.id
        allowed = endpoints(settings.allow_endpoints)
        self._wall = wall.Wall(instance, wall.ruleset(instance, denied(settings), allowed))
        self._forwarders: dict[int, dns.Forwarder] = {}
        servers(settings)
        self._records = instance.directory / "dns"

    async def open(self) -> None:
        """Put the wall in force and let this host forward packets. Raises EngineError when the machine refuses."""
        self._records.mkdir(mode=0o700, exist_ok=True)
        await self._wall.open()
        await finished(_forward_packets)

    async def close(self) -> None:
        """End the forwarders; the wall stays for as long as a link does."""
        for forwarder in self._forwarders.values():
            await forwarder.close()
        self._forwarders.clear()
        await self._wall.close(remove=not self._links())

    async def attach(self, index: int, netns: Path) -> Link:
        """Connect the empty namespace bound to the file `netns`; what the slot had before is removed.

        Raises EngineError, and then leaves nothing behind.
        """
        link = self._link(index)
        await self.detach(index)
        try:
            await finished(lambda: _connect(link, netns, wall.routes(self._instance)))
            if not direct_servers(self._settings):
                await self._forward(index, netns)
        except BaseException as error:
            await self.detach(index)
            if isinstance(error, OSError):
                raise EngineError(f"cannot set up the network in {netns}: {error}") from error
            raise
        return link

    async def detach(self, index: int) -> None:
        """Remove the link of a slot and end its forwarder; nothing happens when there is none."""
        if forwarder := self._forwarders.pop(index, None):
            await forwarder.close()
        (self._records / str(index)).unlink(missing_ok=True)
        await finished(lambda: _disconnect([self._link(index).interface]))

    async def adopt(self, living: Mapping[int, Path]) -> None:
        """After a restart: keep the links of these slots, answer their DNS again, and remove all other links.

        `living` gives for each slot a path to its network namespace that is good now.
        """
        await finished(lambda: _disconnect([self._link(index).interface for index in self._links() - set(living)]))
        for record in list(self._records.iterdir()):
            netns = living.get(int(record.name))
            if netns is None:
                record.unlink()
            elif int(record.name) not in self._forwarders:
                # A box that died meanwhile has no namespace any more; its owner finds that out by itself.
                with contextlib.suppress(OSError):
                    await self._forward(int(record.name), netns)

    def traffic(self, index: int) -> tuple[int | None, int | None]:
        """Bytes that went into the box of a slot and out of it since the link was made."""
        return figures.traffic(self._link(index).interface)

    def resolv_conf(self, link: Link) -> str:
        """The content of the box's /etc/resolv.conf."""
        named = (dns.LISTEN,) if link.index in self._forwarders else direct_servers(self._settings)
        lines = [f"nameserver {server}" for server in named]
        return "\n".join([*lines, *dns.read_resolv_conf().rest]) + "\n"

    def _link(self, index: int) -> Link:
        return Link(index, f"{self._prefix}{index}", str(self._instance.address(index)), GATEWAY)

    def _links(self) -> set[int]:
        """The slots that have a link on this machine."""
        names = [name for _, name in socket.if_nameindex() if name.startswith(self._prefix)]
        return {int(name[len(self._prefix) :]) for name in names if name[len(self._prefix) :].isdigit()}

    async def _forward(self, index: int, netns: Path) -> None:
        forwarder = dns.Forwarder(lambda: servers(self._settings))
        await forwarder.open(netns)
        self._forwarders[index] = forwarder
        (self._records / str(index)).touch()


def servers(settings: Settings) -> tuple[str, ...]:
    """The resolvers that answer boxes in the end: those of the settings, else those of the host.

    Raises SetupError for what is no address.
    """
    for server in settings.dns_servers:
        if not dns.is_address(server):
            raise SetupError(f"cannot use {server!r} in dns_servers: write an address, as in 192.0.2.53")
    return settings.dns_servers or dns.read_resolv_conf().servers


def direct_servers(settings: Settings) -> tuple[str, ...]:
    """The resolvers to which boxes lead straight; none when the first one is out of their reach."""
    walls = denied(settings)

    def reachable(server: str) -> bool:
        if ":" in server or any(ipaddress.IPv4Address(server) in network for network in walls):
            return False
        return not dns.is_local(server)

    every = servers(settings)
    within = tuple(filter(reachable, every))
    return within if every[0] in within else ()


def denied(settings: Settings) -> list[ipaddress.IPv4Network]:
    """Every network that boxes may not reach, their own aside."""
    return [*map(ipaddress.IPv4Network, DENIED), *networks(settings.deny_cidrs)]


def _forward_packets() -> None:
    forwarding = _SYS / "ipv4/ip_forward"
    try:
        # Writing the same value again would reset other settings of the kernel.
        if forwarding.read_text().strip() != "1":
            forwarding.write_text("1")
    except OSError as error:
        raise EngineError(f"cannot let this host forward packets of boxes: {forwarding}: {reason(error)}") from error


def _connect(link: Link, netns: Path, routes: int) -> None:
    ip(
        f"link add {link.interface} address {_MAC} type veth peer name eth0 address {_MAC} netns {netns}",
        f"link set {link.interface} up arp off addrgenmode none",
        f"route replace {link.address}/32 dev {link.interface} table {routes}",
    )
    _set(f"ipv4/conf/{link.interface}/route_localnet", "0")
    _set(f"ipv4/conf/{link.interface}/rp_filter", "1")
    _set(f"ipv4/conf/{link.interface}/src_valid_mark", "1")
    _set(f"ipv6/conf/{link.interface}/accept_ra", "0")
    _set(f"ipv6/conf/{link.interface}/disable_ipv6", "1")
    inside(netns, lambda: _configure(link))


def _configure(link: Link) -> None:
    """Runs inside the box's namespace, before anything of the box does."""
    _set("ipv6/conf/all/accept_ra", "0")
    _set("ipv6/conf/default/disable_ipv6", "1")
    _set("ipv6/conf/eth0/disable_ipv6", "1")
    _set("ipv4/ping_group_range", "0\t2147483647")
    _set("ipv4/ip_unprivileged_port_start", "0")
    ip(
        "link set lo up",
        f"addr add {link.address}/32 dev eth0",
        "link set eth0 up",
        f"route add {link.gateway}/32 dev eth0 scope link",
        f"neigh replace {link.gateway} lladdr {_MAC} dev eth0 nud permanent",
        f"route add default via {link.gateway} src {link.address}",
    )


def _set(name: str, value: str) -> None:
    """Write a setting of the kernel; one of IPv6 may be missing together with IPv6 itself."""
    try:
        (_SYS / name).write_text(value)
    except OSError as error:
        if not (name.startswith("ipv6/") and not (_SYS / "ipv6").exists()):
            raise EngineError(f"cannot set {_SYS / name} to {value.split()[0]}: {reason(error)}") from error


def _disconnect(interfaces: Iterable[str]) -> None:
    present = [name for name in interfaces if _is_there(name)]
    if not present:
        return
    try:
        ip(*(f"link delete {name}" for name in present), force=True)
    except EngineError:
        # A link also vanishes by itself when its namespace does; only one that is still there is an error.
        if any(map(_is_there, present)):
            raise


def _is_there(interface: str) -> bool:
    try:
        return socket.if_nametoindex(interface) > 0
    except OSError:
        return False


def networks(texts: Iterable[str]) -> list[ipaddress.IPv4Network]:
    """The IPv4 networks among `deny_cidrs`; those of IPv6 are denied anyway, because boxes have none.

    Raises SetupError for what is no network.
    """
    found = []
    for text in texts:
        try:
            network = ipaddress.ip_network(text.strip(), strict=False)
        except ValueError as error:
            raise SetupError(f"cannot use {text!r} in deny_cidrs: {error}; write it as in 10.0.0.0/8") from error
        if isinstance(network, ipaddress.IPv4Network):
            found.append(network)
    return found


def endpoints(texts: Iterable[str]) -> list[tuple[ipaddress.IPv4Address, int]]:
    """The addresses and ports of `allow_endpoints`. Raises SetupError for what is none, or cannot work."""
    found = []
    for text in texts:
        address, _, port = text.strip().rpartition(":")
        try:
            endpoint = ipaddress.IPv4Address(address), int(port)
        except ValueError as error:
            raise SetupError(
                f"cannot use {text!r} in allow_endpoints: {error}; write it as in 192.0.2.1:3128"
            ) from error
        if endpoint[0].is_loopback or not 0 < endpoint[1] < 65536:
            raise SetupError(
                f"cannot use {text!r} in allow_endpoints: a box's loopback is its own and ports go from 1 to 65535; "
                "let the service listen on another address of this host and name that one"
            )
        found.append(endpoint)
    return found
