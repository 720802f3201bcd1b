"""Every command in the hands of a stranger: without root, with a wrong folder, server or key, with output that is gone.

Whatever is wrong, a command says so in one sentence, never in a traceback, and makes nothing.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.store.db import FILE_NAME, Store
from support.commands import NO_KEY, devboxd, every_command, refused
from support.server import Server

ID = "dbx_" + "0" * 21
SNAPSHOT = "snp_" + "0" * 21
HERE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("serve",): ("--state", "STATE"),
    ("doctor",): ("--state", "STATE"),
    ("systemd-unit",): ("--state", "STATE"),
    ("image", "build"): (),
    ("keys", "create"): ("--state", "STATE"),
    ("keys", "list"): ("--state", "STATE"),
    ("keys", "revoke"): ("key_" + "0" * 21, "--state", "STATE"),
    ("storage", "status"): ("--state", "STATE"),
    ("storage", "grow"): ("64G", "--state", "STATE"),
    ("storage", "check"): ("--state", "STATE"),
    ("storage", "recover"): ("--state", "STATE"),
    ("backup",): ("TARGET", "--state", "STATE"),
    ("restore",): ("SOURCE", "--state", "STATE"),
    ("completion",): ("bash",),
}
"""What is done on this machine. STATE is a folder that no server has used."""
THERE: dict[tuple[str, ...], tuple[str, ...]] = {
    ("boxes", "list"): (),
    ("boxes", "create"): ("--name", "x"),
    ("boxes", "exec"): (ID, "--", "true"),
    ("boxes", "logs"): (ID,),
    ("boxes", "logs", "-f"): (ID,),
    ("boxes", "cp"): ("/etc/hosts", f"{ID}:x"),
    ("boxes", "suspend"): ("a name",),
    ("boxes", "resume"): (ID,),
    ("boxes", "snapshot"): (ID,),
    ("boxes", "fork"): ("a name",),
    ("boxes", "shutdown"): (ID,),
    ("boxes", "shutdown", "--all"): (),
    ("snapshot", "list"): (),
    ("snapshot", "verify"): (SNAPSHOT,),
}
"""What a server is asked for."""
NAMING = [command for command in THERE if {ID, SNAPSHOT, "a name", f"{ID}:x"} & set(THERE[command])]
HARMLESS = {("doctor",), ("systemd-unit",), ("completion",)}
"""What may succeed for anybody."""
NEED_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def as_typed(command: tuple[str, ...], folder: Path) -> list[str]:
    words = {"STATE": str(folder / "typo"), "TARGET": str(folder / "target"), "SOURCE": str(folder / "source")}
    return [words.get(word, word) for word in (*command, *{**HERE, **THERE}[command])]


def checked(done: subprocess.CompletedProcess[str], *, may_succeed: bool = False) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    if not (may_succeed and done.returncode == 0):
        if may_succeed:
            assert done.returncode == 2, done
        else:
            refused(done)


def test_every_command_is_tried_here() -> None:
    tried = {tuple(word for word in command if not word.startswith("-")) for command in {**HERE, **THERE}}
    words = every_command()
    leaves = {one for one in words if not any(other[: len(one)] == one and other != one for other in words)}
    assert leaves <= tried, leaves - tried


@NEED_ROOT
@pytest.mark.parametrize("command", HERE, ids=" ".join)
def test_without_root(command: tuple[str, ...], tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    code = (
        "import os, pkgutil, sys, encodings.unicode_escape, encodings.idna, importlib, devboxd.cli, rich.padding;"
        "import rich.console, rich.progress, devboxd.doctor, devboxd.backup, devboxd.storage, devboxd.systemd;"
        "import devboxd.store.db, devboxd.resources.accounts, shutil, devboxd.logs, devboxd.engine.images;"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "sys.argv = ['devboxd', *sys.argv[1:]]; devboxd.cli.main()"
    )
    environment = {**os.environ, **NO_KEY, "DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_CACHE": str(cache / "within")}
    arguments = [sys.executable, "-c", code, *as_typed(command, tmp_path)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=120, check=False)
    checked(done, may_succeed=command in HARMLESS)
    if command not in HARMLESS:
        assert "root" in done.stderr or "no server has used this folder" in done.stderr, "it says what is missing"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "nothing is made"


@NEED_ROOT
@pytest.mark.parametrize("command", [one for one in HERE if one not in {("serve",), ("image", "build")}], ids=" ".join)
def test_with_a_folder_that_no_server_has_used(command: tuple[str, ...], tmp_path: Path) -> None:
    done = devboxd(*as_typed(command, tmp_path))
    checked(done, may_succeed=command in HARMLESS)
    assert list(tmp_path.iterdir()) == [], "nothing is made"


@pytest.mark.parametrize("command", THERE, ids=" ".join)
@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "http://127.0.0.1:x", "OTHER"])
def test_with_a_wrong_address(command: tuple[str, ...], url: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        if url == "OTHER":  # something else than HTTP answers
            url = f"http://127.0.0.1:{other.getsockname()[1]}"
            answering = subprocess.Popen(
                [sys.executable, "-c", "import socket, sys; s = socket.socket(fileno=int(sys.argv[1]))\nwhile True:\n"
                 "    c, _ = s.accept(); c.sendall(b'SSH-2.0-x\\r\\n'); c.close()", str(other.fileno())],
                pass_fds=(other.fileno(),),
            )  # fmt: skip
        else:
            answering = None
        begun = time.monotonic()
        done = devboxd(*as_typed(command, tmp_path), env={"DEVBOXD_KEY": "ak_x", "DEVBOXD_URL": url})
        took = time.monotonic() - begun
        if answering:
            answering.kill()
            answering.wait()
    refused(done)
    assert took < 20, "it is told at once, not after a minute of trying"


@pytest.mark.parametrize("command", THERE, ids=" ".join)
def test_with_a_wrong_key(command: tuple[str, ...], server: Server, tmp_path: Path) -> None:
    refused(devboxd(*as_typed(command, tmp_path), env={"DEVBOXD_KEY": "ak_x", "DEVBOXD_URL": server.url}), "key")


@pytest.mark.parametrize("command", NAMING, ids=" ".join)
def test_with_ids_and_names_that_are_nobodys(command: tuple[str, ...], server: Server, tmp_path: Path) -> None:
    refused(devboxd(*as_typed(command, tmp_path), env={"DEVBOXD_KEY": server.key, "DEVBOXD_URL": server.url}))


SPEAKING = (("completion", "bash"), ("doctor",), ("systemd-unit",), ("--help",), ("boxes", "exec", "--help"))


@pytest.mark.parametrize("command", SPEAKING, ids=" ".join)
def test_output_that_nobody_reads(command: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    arguments = [sys.executable, "-m", "devboxd.cli", *command]
    with open(writing, "wb") as gone:
        done = subprocess.run(arguments, stdout=gone, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False)
    assert (done.returncode, done.stderr) == (141, b""), "as other programs: nothing is said"


@pytest.mark.parametrize("command", SPEAKING, ids=" ".join)
def test_output_to_a_full_disk(command: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "devboxd.cli", *command], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (
        2,
        b"cannot go on: its disk is full; free some space, or name another path\n",
    )


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk in memory that is full, with a store on it; its folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", tmp_path], check=True)
    try:
        Store.open(tmp_path / "typo" / FILE_NAME).close()
        with contextlib.suppress(OSError), open(tmp_path / "fill", "wb", buffering=0) as fill:
            while True:
                fill.write(bytes(4096))
        yield tmp_path
    finally:
        subprocess.run(["umount", tmp_path], check=True)


@NEED_ROOT
@pytest.mark.parametrize("command", [one for one in HERE if one not in HARMLESS], ids=" ".join)
def test_on_a_full_disk(command: tuple[str, ...], full: Path) -> None:
    before = sorted(path.name for path in full.iterdir())
    done = devboxd(*as_typed(command, full), env={"DEVBOXD_CACHE": str(full / "cache")})
    checked(done)
    assert {path.name for path in full.iterdir()} - {*before, "cache"} == set(), "nothing is left half made"


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&-", "<&- 2>&-"])
def test_streams_that_are_closed(closed: str) -> None:
    command = f"{sys.executable} -m devboxd.cli completion bash {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    if ">&-" in closed.split():
        refused(done, "standard output")
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert "_DEVBOXD_COMPLETE" in done.stdout


def test_an_interrupt_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        command = ["env", "--default-signal=INT", sys.executable, "-m", "devboxd.cli", "boxes", "list"]
        environment = {**os.environ, "DEVBOXD_URL": url, "DEVBOXD_KEY": "ak_x"}
        with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
            connection, _ = silent.accept()
            with connection:
                connection.recv(1)  # it asks, and nobody answers
                child.send_signal(signal.SIGINT)
                assert child.wait(20) == 130
            assert child.stderr is not None
            assert child.stderr.read() == "stopped, as Ctrl-C asked\n"


@pytest.mark.parametrize("command", [("doctor",), ("serve", "--state", "/proc/x"), ("keys", "list", "--state", "/x")])
@pytest.mark.parametrize("colourless", [True, False])
def test_no_colours_where_none_are_wanted(command: tuple[str, ...], colourless: bool) -> None:
    shown = _shown([sys.executable, "-m", "devboxd.cli", *command], {"NO_COLOR": "1"} if colourless else {})
    coloured = re.search(rb"\x1b\[[\d;]*m", shown) is not None
    assert coloured == (not colourless and command == ("doctor",)), shown[-500:]


def test_no_colours_in_the_log() -> None:
    code = (
        "from devboxd import logs; logs.configure('auto'); import structlog; structlog.get_logger().error('said', n=1)"
    )
    for environment, coloured in (({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({}, True)):
        shown = _shown([sys.executable, "-c", code], environment)
        assert b"said" in shown
        assert (b"\x1b[" in shown) == coloured, shown
    text = code.replace("'auto'", "'text'")
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, check=True)
    assert b"\x1b[" not in done.stderr, "a file is no terminal"


def _shown(command: list[str], environment: dict[str, str]) -> bytes:
    """What a command shows on a terminal."""
    ours, terminal = os.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    env = {**inherited, "DEVBOXD_CONFIG": "/dev/null", "TERM": "xterm", **environment}
    shown = b""
    with (
        subprocess.Popen(command, env=env, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL) as child,
        open(ours, "rb", buffering=0) as reader,
    ):
        os.close(terminal)
        try:
            while piece := reader.read(65536):
                shown += piece
        except OSError:  # the terminal has no other side any more
            pass
        child.wait(60)
    return shown
