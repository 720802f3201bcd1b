"""Files that the server writes into a box's root, whatever the box has put in their place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from devboxd.engine import disks


def put(root: Path) -> None:
    disks._put(root, "etc/hosts", "127.0.0.1 localhost\n")


def test_a_folder_is_moved_aside_and_not_emptied(tmp_path: Path) -> None:
    """Emptying one of a million names took 50 s."""
    folder = tmp_path / "etc" / "hosts"
    folder.mkdir(parents=True)
    for number in range(1000):
        (folder / str(number)).touch()
    put(tmp_path)
    assert (tmp_path / "etc/hosts").read_text() == "127.0.0.1 localhost\n"
    (kept,) = (path for path in (tmp_path / "etc").iterdir() if path.name != "hosts")
    assert len(os.listdir(kept)) == 1000


@pytest.mark.parametrize("kind", ["pipe", "link", "dangling", "large", "whiteout", "closed", "file"])
def test_whatever_is_in_its_place_gives_way(tmp_path: Path, kind: str) -> None:
    etc, outside = tmp_path / "root" / "etc", tmp_path / "outside"
    etc.mkdir(parents=True)
    outside.write_text("outside")
    hosts = etc / "hosts"
    match kind:
        case "pipe":
            os.mkfifo(hosts)
        case "link":
            hosts.symlink_to(outside)
        case "dangling":
            hosts.symlink_to(tmp_path / "made")
        case "large":
            with hosts.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, 8 << 20)
        case "whiteout":
            if os.geteuid() != 0:
                pytest.skip("making a device needs root")
            os.mknod(hosts, stat.S_IFCHR, 0)
        case "closed":
            (hosts / "in").mkdir(parents=True)
            hosts.chmod(0)
        case "file":
            hosts.write_text("old")
    put(tmp_path / "root")
    assert hosts.read_text() == "127.0.0.1 localhost\n"
    assert stat.S_ISREG(hosts.lstat().st_mode)
    assert outside.read_text() == "outside"
    assert not (tmp_path / "made").exists()
    assert len(list(etc.iterdir())) == (2 if kind in ("large", "closed") else 1)


@pytest.mark.parametrize("kind", ["pipe", "link", "file"])
def test_in_the_place_of_a_folder_nothing_is_touched(tmp_path: Path, kind: str) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    match kind:
        case "pipe":
            os.mkfifo(root / "etc")
        case "link":
            (root / "etc").symlink_to(outside)
        case "file":
            (root / "etc").write_text("text")
    put(root)
    assert os.listdir(outside) == []
    assert os.listdir(root) == ["etc"]
