"""The server is killed at random moments under load, and nothing that it confirmed is lost, doubled or left behind.

`make crash` kills it more often. CRASH_SEED repeats a run: the same moments and the same requests.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from devboxd.devboxes import store as devboxes
from devboxd.devboxes.store import Devbox
from devboxd.executions import store as executions
from devboxd.executions.store import Execution
from devboxd.store.db import Store
from support.actor import Notes, Started
from support.casualties import MAKING, MOMENTS
from support.load import Load
from support.server import Server

KILLS = int(os.environ.get("CRASH_KILLS", "10"))
_A_ROUND = 10
_COPIES = 8
pytestmark = [pytest.mark.box, pytest.mark.timeout(120 + 30 * KILLS)]


@pytest.fixture
def seed() -> str:
    """The seed of this run, which the end of the report names."""
    return os.environ["CRASH_SEED"]


def test_a_kill_at_any_moment_loses_nothing_that_was_confirmed(own_server: Server, seed: str) -> None:
    """Devboxes die under the load too, by their first process or by the runtime.

    After each round all is compared; when the server is stopped, whatever stays on the machine fails the test.
    """
    chance = random.Random(seed)
    deaths: Counter[str] = Counter()
    for number in range(0, KILLS, _A_ROUND):
        with Load(own_server, f"{seed}/{number}") as load:
            for _ in range(min(_A_ROUND, KILLS - number)):
                time.sleep(chance.uniform(0, 1.5))  # the moment is what varies here; a start takes most of a second
                own_server.kill()
                own_server.launch()
                if chance.random() < 0.7:
                    own_server.wait_ready()
            own_server.wait_ready()
        executions = load.check()
        deaths.update(dead.moment for dead in load.notes.dead)
        print(f"seed {seed}, {number + _A_ROUND} kills: {executions} executions, {len(load.notes.boxes)} devboxes")
    print(f"killed besides: {deaths}")
    assert set(deaths) == {*MOMENTS, MAKING}, "some way to die was not tried"
    own_server.kill()
    _check_sound(own_server.state / "devboxd.db")
    own_server.start()


@dataclass
class Copy:
    """The store and the journals of one moment, and what had been confirmed by then."""

    folder: Path
    boxes: list[str]
    ended: list[str]
    executions: list[tuple[Started, bool, int]]
    """Each with whether its end was confirmed, and how many bytes of stdin were."""


def test_a_copy_of_any_moment_opens_and_has_all_that_was_confirmed(
    own_server: Server, seed: str, tmp_path: Path
) -> None:
    """The server is held while the files are copied; its boxes go on writing journals."""
    chance = random.Random(seed)
    copies = []
    with Load(own_server, f"{seed}/copies") as load:
        for number in range(_COPIES):
            time.sleep(chance.uniform(0, 1))  # the moment is what varies here
            copies.append(_copied(own_server, load, tmp_path / str(number)))
    assert any(copy.executions for copy in copies), "nothing was confirmed before the last copy"
    for copy in copies:
        _check_copy(copy)
    load.check()


def _copied(server: Server, load: Load, folder: Path) -> Copy:
    folder.mkdir()
    os.kill(server.pid, signal.SIGSTOP)
    try:
        os.waitid(os.P_PID, server.pid, os.WSTOPPED)
        copy = _noted(load.notes, folder)
        for name in ("devboxd.db", "devboxd.db-wal"):
            shutil.copy(server.state / name, folder / name)
        if (journals := server.state / "journals" / load.box).exists():
            shutil.copytree(journals, folder / "journals")
    finally:
        os.kill(server.pid, signal.SIGCONT)
    return copy


def _noted(notes: Notes, folder: Path) -> Copy:
    started = [(one, one.completed, len("".join(one.fed or []).encode())) for one in list(notes.executions)]
    return Copy(folder, list(notes.boxes.values()), list(notes.ended), started)


def _check_sound(store: Path) -> None:
    with sqlite3.connect(store) as connection:
        assert list(connection.execute("PRAGMA integrity_check")) == [("ok",)]


def _check_copy(copy: Copy) -> None:
    boxes, found = asyncio.run(_rows(copy))
    for box in copy.boxes:
        assert boxes[box] is not None, f"{box} was confirmed before the copy"
    for box in copy.ended:
        assert boxes[box].status == "shutdown", f"the end of {box} was confirmed before the copy"  # type: ignore[union-attr]
    for started, completed, fed in copy.executions:
        row = found[started.id]
        assert row is not None, f"{started} was confirmed before the copy"
        assert row.stdin_length >= fed, f"{fed} bytes for {started} were confirmed before the copy"
        if completed:
            assert (row.status, row.exit_status) == ("completed", started.status), row
        if row.status == "completed" and (journal := copy.folder / "journals" / f"{row.id}.stdout").exists():
            assert journal.read_bytes()[: row.stdout_length] == started.stdout().encode(), started
    _check_sound(copy.folder / "devboxd.db")


async def _rows(copy: Copy) -> tuple[dict[str, Devbox | None], dict[str, Execution | None]]:
    store = Store.open(copy.folder / "devboxd.db")
    try:
        boxes = {box: await store.read(partial(devboxes.get, devbox_id=box)) for box in copy.boxes}
        ids = [started.id for started, _, _ in copy.executions]
        return boxes, {one: await store.read(partial(executions.by_id, execution_id=one)) for one in ids}
    finally:
        store.close()
