"""The port is this server's alone, or the server refuses in one line."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from devboxd.errors import SetupError
from devboxd.http.listening import listen
from support.server import PROGRAM, Server, free_port

needs_root = pytest.mark.box


def serve(folder: Path, *arguments: str, **environment: str) -> str:
    """Run `devboxd serve`, which must refuse in one line, with what a builder said below it; all of that."""
    done = subprocess.run(
        [PROGRAM, "serve", "--state", folder / "state", *arguments],
        env={**os.environ, "DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_LOG_FORMAT": "text", **environment},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done
    refusals = [line for line in done.stderr.splitlines() if line.startswith("cannot ")]
    assert len(refusals) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr[done.stderr.index(refusals[0]) :]


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    """A port of another program that would share it, as servers behind SO_REUSEPORT do."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other


def test_a_port_that_others_would_share_is_not_shared(taken: socket.socket) -> None:
    with pytest.raises(SetupError, match=rf"^cannot listen on .*in use by .*\(pid {os.getpid()}\); stop it"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_a_port_with_old_connections_is_taken_at_once() -> None:
    port = free_port()
    with listen("127.0.0.1", port) as listener, socket.create_connection(("127.0.0.1", port)) as client:
        listener.setblocking(True)
        listener.accept()[0].close()  # the side that closes first is the one that lingers
        assert client.recv(1) == b""
    listen("127.0.0.1", port).close()


@pytest.mark.parametrize(
    ("level", "option"),
    [
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
    ],
)
def test_each_connection_sends_at_once_and_notices_peers_that_are_gone(level: int, option: int) -> None:
    port = free_port()
    with listen("127.0.0.1", port) as listener, socket.create_connection(("127.0.0.1", port)):
        listener.setblocking(True)
        with listener.accept()[0] as accepted:
            assert accepted.getsockopt(level, option) == 1


@needs_root
def test_a_port_in_use_is_refused_and_its_owner_named(server: Server, tmp_path: Path) -> None:
    refusal = serve(tmp_path, "--port", str(server.port))
    assert refusal.startswith(f"cannot listen on 127.0.0.1:{server.port}: ")
    assert f"(pid {server.pid})" in refusal
    with server.api() as api:
        assert api.http.get("/healthz").status_code == 200


@needs_root
@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"DEVBOXD_HOST": "256.1.1.1"}, "256.1.1.1"),
        ({"DEVBOXD_HOST": "203.0.113.9"}, "does not have that address"),
        ({"DEVBOXD_HOST": "::z"}, "::z"),
        ({"DEVBOXD_PORT": "70000"}, "65535"),
        ({"DEVBOXD_PORT": "0"}, "from 1 to 65535"),
        ({"DEVBOXD_HOST": "nowhere.invalid"}, "'nowhere.invalid' is no address of this machine"),
        ({"DEVBOXD_HOST": "2001:db8::9"}, "does not have that address"),
        ({"DEVBOXD_HOST": "x" * 300}, "is no address of this machine"),
        ({"DEVBOXD_HOST": "http://localhost"}, "'http://localhost' is no address of this machine"),
    ],
)
def test_what_is_no_address_or_port_is_refused_and_nothing_made(
    tmp_path: Path, environment: dict[str, str], words: str
) -> None:
    port = {} if "DEVBOXD_PORT" in environment else {"DEVBOXD_PORT": str(free_port())}
    assert words in serve(tmp_path, **environment, **port)
    assert list(tmp_path.iterdir()) == [], "what cannot listen makes nothing"


@needs_root
def test_a_busy_port_is_refused_before_anything_is_made(taken: socket.socket, tmp_path: Path) -> None:
    refusal = serve(tmp_path, "--port", str(taken.getsockname()[1]), "--host", "0.0.0.0")
    assert refusal.startswith("cannot listen on 0.0.0.0:")
    assert list(tmp_path.iterdir()) == []


def test_ipv6_is_listened_on_and_answers() -> None:
    port = free_port()
    with listen("::1", port) as listener, socket.create_connection(("::1", port)):
        assert listener.family == socket.AF_INET6
        with pytest.raises(SetupError, match=rf"^cannot listen on \[::1\]:{port}: the port is in use by "):
            listen("::1", port)


@needs_root
def test_the_address_that_is_told_can_be_opened(tmp_path: Path) -> None:
    """With the brackets of a URL, where it is one of IPv6."""
    port = free_port()
    told = ""
    with subprocess.Popen(
        [PROGRAM, "serve", "--state", tmp_path / "state", "--host", "::1", "--port", str(port)],
        env={**os.environ, "DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_LOG_FORMAT": "json", "DEVBOXD_WARM_BOXES": "0"},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        assert server.stderr is not None
        for line in server.stderr:
            if '"event":"ready"' in line:
                told = json.loads(line)["url"]
                break
        try:
            assert told == f"http://[::1]:{port}"
            assert httpx.get(f"{told}/healthz").json() == {"status": "ready"}
        finally:
            server.terminate()
            server.stderr.read()


@needs_root
def test_an_image_that_cannot_be_built_is_told_with_what_the_builder_said(tmp_path: Path) -> None:
    words = serve(
        tmp_path,
        DEVBOXD_PORT=str(free_port()),
        DEVBOXD_CACHE=str(tmp_path / "cache"),
        DEVBOXD_APT_MIRROR="http://127.0.0.1:9/debian",
        DEVBOXD_CA_CERTIFICATES="",
    )
    assert re.match(r"cannot build the image: .*\n(  .*\n)+What helps: .*apt_mirror.*\n$", words), words
