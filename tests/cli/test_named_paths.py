"""Paths that cannot be right, for every option and argument that takes one: one sentence, without errno's numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.store.db import FILE_NAME, Store
from support.commands import devboxd, refused

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
NUMBER = "[Errno"
COMMANDS = {
    "--key-file": ("boxes", "list", "--key-file", "PATH"),
    "--config": ("keys", "list", "--config", "PATH"),
    "--state": ("keys", "list", "--state", "PATH"),
    "--state of serve": ("serve", "--state", "PATH"),
    "--state of storage": ("storage", "status", "--state", "PATH"),
    "--state of backup": ("backup", "NEW", "--state", "PATH"),
    "DIR of backup": ("backup", "PATH", "--state", "STATE"),
    "--secrets": ("backup", "NEW", "--secrets", "PATH", "--state", "STATE"),
    "DIR of restore": ("restore", "PATH", "--state", "NEW"),
}
FILES = ("--key-file", "--config")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a path of each kind, and `state`, which a server has used."""
    (tmp_path / "file").write_text("key = [")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("missing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\0")
    Store.open(tmp_path / "state" / FILE_NAME).close()
    return tmp_path


def told(command: str, path: Path | str, folder: Path, *words: str) -> None:
    given = {"PATH": str(path), "NEW": str(folder / "new"), "STATE": str(folder / "state")}
    done = devboxd(*(given.get(word, word) for word in COMMANDS[command]), env={"DEVBOXD_KEY": "ak_x"})
    refused(done, *words)
    assert NUMBER not in done.stderr
    assert "; " in done.stderr, "it says what to do"
    assert len(done.stderr) < 500
    assert not (folder / "new").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/x", "a part of its path is a file"),
        ("loop", "lead in a circle"),
        ("dangling", "a symbolic link to nothing"),
        ("x" * 300, "longer than Linux allows"),
        ("x/" * 2500, "longer than Linux allows"),
    ],
    ids=["below a file", "loop", "dangling", "long name", "long path"],
)
@pytest.mark.skipif(os.geteuid() != 0, reason="serve, storage and backup ask for root first")
def test_a_path_where_nothing_can_be(command: str, name: str, words: str, folder: Path) -> None:
    told(command, folder / name, folder, words)


@ROOT
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_for_a_folder_and_a_folder_for_a_file(command: str, folder: Path) -> None:
    if command in FILES:
        told(command, folder / "folder", folder, "it is a folder; name a file")
        told(command, folder / "binary", folder, "no text")
        told(command, folder / "none", folder, "no such file")
    else:
        told(command, folder / "file", folder, "it is a file; name a folder")


@ROOT
@pytest.mark.parametrize("command", ["--state of serve", "DIR of backup"])
@pytest.mark.parametrize("path", ["/proc/x", "/sys/x"])
def test_a_file_system_in_which_no_folder_can_be_made(command: str, path: str, folder: Path) -> None:
    told(command, path, folder, path)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("STATE", "file", "it is a file"),
        ("CACHE", "loop", "in a circle"),
        ("CACHE", "file/x", "a part of its path"),
        ("CONFIG", "folder", "it is a folder"),
        ("CONFIG", "loop", "in a circle"),
        ("CONFIG", "none", "no such file"),
    ],
)
def test_paths_of_the_environment(variable: str, value: str, words: str, folder: Path) -> None:
    done = devboxd("doctor", env={f"DEVBOXD_{variable}": str(folder / value)})
    refused(done, words, value)
    assert NUMBER not in done.stderr


@ROOT
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CA_CERTIFICATES", "/nonexistent"),
        ("CA_CERTIFICATES", "/etc"),
        ("CA_CERTIFICATES", "/etc/hosts"),
        ("APT_MIRROR", "x"),
        ("DNS_SERVERS", "x"),
        ("DOMAINS", "a b"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told_once(variable: str, value: str, tmp_path: Path) -> None:
    done = devboxd("serve", "--state", str(tmp_path / "state"), env={f"DEVBOXD_{variable}": value})
    refused(done, value, variable.lower().removesuffix("s").replace("ca_certificate", "CA certificate"))
    assert NUMBER not in done.stderr
    assert not (tmp_path / "state").exists()


# another user than the owner


@pytest.fixture
def closed(folder: Path) -> Iterator[Path]:
    """The state folder closed to others, on a path that is open to them."""
    (folder / "state").chmod(0o700)
    opened = [place for place in (folder, *folder.parents) if place.stat().st_mode & 0o005 != 0o005]
    modes = {place: place.stat().st_mode & 0o7777 for place in opened}
    for place in opened:
        place.chmod(modes[place] | 0o055)
    yield folder / "state"
    for place in opened:
        place.chmod(modes[place])


def as_nobody(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command without root, whose modules root has loaded: nobody need be able to read the checkout."""
    code = (
        "import asyncio, os, sys, devboxd.app, devboxd.config, devboxd.doctor, devboxd.storage, devboxd.backup;"
        "from devboxd.engine import images; from devboxd import cli, remote, remote_exec, systemd, logs;"
        "from devboxd.cli import printing; import rich.console, rich.progress, rich.table;"
        "os.chdir('/'); os.setgroups([]); os.setgid(65534); os.setuid(65534); sys.argv = ['devboxd', *sys.argv[1:]];"
        "cli.main()"
    )
    environ = {**os.environ, "DEVBOXD_CONFIG": "/dev/null", "NO_COLOR": "1", "COLUMNS": "60", "DEVBOXD_KEY": "ak_x"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environ, stdin=subprocess.DEVNULL,
        text=True, capture_output=True, timeout=120, check=False,
    )  # fmt: skip


@ROOT
@pytest.mark.parametrize(
    "command",
    [
        *(("keys", "create"), ("keys", "list"), ("keys", "revoke", "key_" + "0" * 21)),
        *(("storage", "status"), ("storage", "grow", "8G"), ("storage", "check"), ("storage", "recover")),
        *(("backup", "/tmp/never"), ("serve",)),
    ],
    ids=" ".join,
)
def test_a_folder_of_root_needs_root(command: tuple[str, ...], closed: Path) -> None:
    done = as_nobody(*command, "--state", str(closed))
    refused(done, "run this as root, with sudo")


@ROOT
def test_files_that_others_may_not_read_are_named_with_what_helps(closed: Path) -> None:
    secret = closed / "key"
    secret.write_text("ak_x")
    refused(as_nobody("boxes", "list", "--key-file", str(secret)), str(secret), "permission denied", "with sudo")
    refused(as_nobody("keys", "list", "--config", str(secret)), str(secret), "permission denied", "with sudo")
    refused(as_nobody("keys", "list", "--state", "/nonexistent"), "no server has used")
