"""The walls, asked from inside a devbox that the server itself made, by its user and by root in it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from devboxd.engine.netns import inside
from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box


def addresses_of_the_host() -> set[str]:
    """Every address of this machine but those of its loopback."""
    found = re.findall(r"^.*?\|-- ([\d.]+)\n\s+/32 host LOCAL$", Path("/proc/net/fib_trie").read_text(), re.M)
    return {address for address in found if not address.startswith("127.")}


def reaches(api: Api, box: str, host: str, port: int) -> bool:
    """Whether a TCP connection from the devbox is answered at all, by a welcome or by a refusal."""
    command = f"timeout 2 bash -c 'exec 3<>/dev/tcp/{host}/{port}' 2>&1; echo $?"
    said = api.output(box, command)
    return "refused" in said or said.strip() == "0"


def test_a_devbox_reaches_neither_the_server_nor_the_host(api: Api, box: str, server: Server) -> None:
    own = addresses_of_the_host()
    gateway = api.output(box, "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").strip()
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = listener.getsockname()[1]
        for address in {*own, gateway}:
            assert not reaches(api, box, address, port), address
            assert not reaches(api, box, address, urlsplit(server.url).port or 0), address
    assert not reaches(api, box, "169.254.169.254", 80)


def test_a_devbox_reaches_no_other(api: Api, box: str) -> None:
    other = api.create()
    address = api.output(other, "ip -4 -o addr show scope global | awk '{print $4}' | cut -d/ -f1").strip()
    execution = api.start(other, "python3 -m http.server 8000 --bind 0.0.0.0")
    api.output(other, "until timeout 1 bash -c 'exec 3<>/dev/tcp/127.0.0.1/8000' 2>/dev/null; do :; done")
    assert not reaches(api, box, address, 8000)
    api.call("POST", f"/v1/devboxes/{other}/executions/{execution}/kill")
    api.shutdown(other)


@pytest.mark.parametrize(
    "command",
    [
        "sudo cat /proc/1/environ",
        "sudo ls -l /proc/1/fd",
        "sudo dd if=/proc/1/mem of=/dev/null bs=1 count=1",
        "sudo mount -t tmpfs none /mnt",
        "sudo unshare --user true",
        "unshare --user true",
        "sudo sysctl -w kernel.core_pattern=/tmp/x",
        "sudo sh -c 'echo b > /proc/sysrq-trigger'",
        "sudo dmesg",
        "sudo mknod /tmp/disk b 8 0",
        "sudo ip link set lo down",
        "sudo kill -9 1 && test ! -d /proc/1",
        "python3 -c 'import socket; socket.socket(40, socket.SOCK_STREAM)'",
        "python3 -c 'import socket; socket.socket(38, socket.SOCK_SEQPACKET)'",
    ],
)
def test_root_in_a_devbox_is_held(api: Api, box: str, command: str) -> None:
    view = api.run(box, command)
    assert view["exit_status"] != 0, view
    assert api.output(box, "echo alive") == "alive\n"


def test_a_devbox_knows_nothing_of_its_host(api: Api, box: str) -> None:
    assert api.output(box, "cat /proc/self/cgroup").count("devboxd") == 0
    assert api.output(box, "hostname").startswith("devbox-")
    assert api.output(box, "sudo cat /proc/1/cmdline | tr -d '\\0'") == "/run/devboxd/init"
    assert "devboxd-test" not in api.output(box, "cat /proc/mounts | grep -v ' / '")


def test_without_its_network_wall_a_devbox_reaches_nothing_until_it_is_up_again(own_server: Server) -> None:
    """An operator deletes the table while the server is stopped, so that it cannot answer; then it goes on."""
    with own_server.api() as api, socket.create_server(("0.0.0.0", 0)) as listener:
        box, other = api.create(), api.create()
        inside_box = Path(f"/proc/{own_server.agent(box)}/ns/net")
        gateway = api.output(box, "ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p'").strip()
        address = api.output(other, "ip -4 -o addr show scope global | awk '{print $4}' | cut -d/ -f1").strip()
        link = api.output(box, "cat /sys/class/net/eth0/iflink").strip()
        (name,) = [name for index, name in socket.if_nameindex() if str(index) == link]
        table = f"devboxd_{name[3]}"
        own = addresses_of_the_host()
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            subprocess.run(["nft", "delete", "table", "inet", table], check=True)
            for target in (*own, gateway, address):
                for port in (listener.getsockname()[1], own_server.port):
                    assert not answers(inside_box, target, port), target
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        api.output(box, "true")
        while subprocess.run(["nft", "list", "table", "inet", table], capture_output=True, check=False).returncode:
            pass  # ends when the table is there again; the time limit of tests bounds it
        assert "changed the network wall" in own_server.log.read_text()
        assert not answers(inside_box, min(own), listener.getsockname()[1])


def answers(netns: Path, host: str, port: int) -> bool:
    """Whether a TCP connection out of a network namespace is answered, by a welcome or a refusal."""

    def connect() -> bool:
        try:
            socket.create_connection((host, port), 1).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
        return True

    return inside(netns, connect)
