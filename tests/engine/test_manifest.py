"""Digests of what disks hold: of a hostile tree as well, without believing or keeping what is said about it."""

from __future__ import annotations

import os
import resource
import socket
from pathlib import Path

import pytest

from devboxd.engine import manifest, processes
from devboxd.engine.base import EngineError

pytestmark = pytest.mark.anyio


async def test_sockets_do_not_count_and_nothing_is_opened_but_files(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/etc/shadow")
    os.utime(tmp_path, (1, 1))
    before = await manifest.digest(tmp_path)
    for number in range(50):
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(tmp_path / f"socket-{number}"))
    os.utime(tmp_path, (1, 1))
    assert await manifest.digest(tmp_path) == before
    (tmp_path / "file").write_text("CONTENT")
    assert await manifest.digest(tmp_path) != before


async def test_what_cannot_be_read_is_told_by_the_end_of_what_was_said(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot read .* as a whole") as refused:
        await manifest.digest(tmp_path / "missing")
    assert len(str(refused.value)) < 5000


async def test_folders_nested_without_end_take_no_more_memory_than_the_smallest_box(tmp_path: Path) -> None:
    """tar keeps the whole path of each: 2,500 levels took 2.2 GiB."""
    at = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(2500):
        os.mkdir("x" * 250, dir_fd=at)
        below = os.open("x" * 250, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
    os.close(at)
    try:
        with pytest.raises(EngineError, match="cannot read"):
            await manifest.digest(tmp_path)
        with pytest.raises(EngineError, match="cannot keep"):
            await manifest.archive(tmp_path, tmp_path.parent / "archive.tar")
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= processes.MOST_MEMORY >> 10
    finally:
        (tmp_path.parent / "archive.tar").unlink(missing_ok=True)
        await processes.piped(("rm", "-rf", str(tmp_path)), what="remove it")


async def test_what_works_for_the_server_ends_before_it_when_memory_runs_out() -> None:
    found = await processes.piped(("cat", "/proc/self/oom_score_adj", "/proc/self/limits"), what="look")
    assert found.split()[0] == b"500"
    (limit,) = (line for line in found.splitlines() if line.startswith(b"Max address space"))
    assert str(processes.MOST_MEMORY).encode() in limit.split()
