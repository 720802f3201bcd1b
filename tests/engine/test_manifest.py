"""Digests of what disks hold: of a hostile tree as well, without believing or keeping what is said about it."""

from __future__ import annotations

import os
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


async def test_what_works_for_the_server_ends_before_it_when_memory_runs_out() -> None:
    found = await processes.piped(("cat", "/proc/self/oom_score_adj", "/proc/self/limits"), what="look")
    assert found.split()[0] == b"500"
    (limit,) = (line for line in found.splitlines() if line.startswith(b"Max address space"))
    assert str(processes.MOST_MEMORY).encode() in limit.split()
