"""The bounds that disks get when their server is gone: the last that were told, also once their process is dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.engine import pool, volumes
from devboxd.engine.fallback import Fallback

pytestmark = pytest.mark.box


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device of a small disk in a small pool, both of which die with the test."""
    monkeypatch.setattr(pool, "_FIRST", 1 << 30)
    found = pool.Pool(tmp_path)
    found.open()
    if found.kind != "file":
        found.close()
        pytest.skip("this machine has no loop devices, no btrfs, or the folder is on btrfs itself")
    volume = volumes.make(found.folder / "image", 64 << 20)
    yield volume.device
    volume.drop()
    volume.close()
    found.close()


def _kept(device: str) -> int:
    return int(Path("/sys/fs/ext4", device, "reserved_clusters").read_text())


def _processes(before: set[int]) -> set[int]:
    """The children of this process that are new."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return {int(pid) for pid in children.split()} - before


def test_it_waits_for_the_end_and_then_has_the_last_word(device: str, tmp_path: Path) -> None:
    fallback = Fallback(tmp_path / "processes")
    fallback.tell({device: 5000})
    fallback.tell({device: 6000})
    assert _kept(device) != 6000
    fallback.close()
    assert _kept(device) == 6000
    assert (tmp_path / "processes").read_text().strip().isdecimal(), "it left the cgroup of the server"


def test_another_one_takes_the_place_of_one_that_was_killed(device: str, tmp_path: Path) -> None:
    """Also where there is nothing new to be told."""
    before = _processes(set())
    fallback = Fallback(tmp_path / "processes")
    fallback.tell({device: 7000})
    (first,) = _processes(before)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    fallback.tell({device: 7000})
    (second,) = _processes(before)
    assert first != second
    fallback.close()
    assert _kept(device) == 7000


def test_a_line_that_a_kill_has_cut_counts_for_nothing(device: str, tmp_path: Path) -> None:
    fallback = Fallback(tmp_path / "processes")
    fallback.tell({device: 8000})
    assert fallback._process is not None
    assert fallback._process.stdin is not None
    fallback._process.stdin.write(f"{device}=90".encode())
    fallback.close()
    assert _kept(device) == 8000
