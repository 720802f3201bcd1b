"""What the server tells systemd, and what it asks."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from devboxd import systemd


@pytest.mark.anyio
async def test_systemds_watchdog_hears_that_the_loop_turns(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        asked = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000", "WATCHDOG_PID": str(os.getpid())}
        beating = asyncio.create_task(systemd.watchdog(asked))
        for _ in range(3):
            assert await asyncio.get_running_loop().sock_recv(listener, 100) == b"WATCHDOG=1"
        beating.cancel()
    await systemd.watchdog({**asked, "WATCHDOG_PID": "1"})
    await systemd.watchdog({})


def test_systemd_started_what_leads_a_session_or_belongs_to_its_script() -> None:
    assert systemd.started({"SYSTEMD_EXEC_PID": str(os.getsid(0))})
    assert not systemd.started({"SYSTEMD_EXEC_PID": "1"}), "a login or a job, which began a session of its own"
    assert not systemd.started({})


@pytest.mark.parametrize(
    ("told", "stops"),
    [
        ("echo ActiveState=inactive; echo Job=271", True),
        ("echo ActiveState=active", True),
        ("echo ActiveState=inactive", False),
        ("echo ActiveState=inactive; echo Job=", False),
        ("echo System has not been booted with systemd >&2; exit 1", False),
        ("exec sleep 60", False),
    ],
)
def test_systemd_is_asked_whether_the_machine_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, stops: bool
) -> None:
    monkeypatch.setattr(systemd, "_ASK_S", 0.5)
    (tmp_path / "systemctl").write_text(f"#!/bin/sh\n{told}\n")
    (tmp_path / "systemctl").chmod(0o755)
    assert systemd.machine_stops({"PATH": f"{tmp_path}:{os.environ['PATH']}"}) is stops
    assert systemd.machine_stops({"PATH": str(tmp_path / "none")}) is False
