"""The store: group commit, isolation of failures, durability, a full disk, several processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, func, insert, select

from devboxd.errors import SetupError
from devboxd.store.db import FILE_NAME, HEAD, Store, StoreError, TakenError
from devboxd.store.schema import accounts

pytestmark = pytest.mark.anyio
_count = select(func.count()).select_from(accounts)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / FILE_NAME


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store.open(path)
    yield store
    store.close()


def add(name: str) -> Any:
    def write(connection: Connection) -> str:
        connection.execute(insert(accounts), {"id": name, "name": "", "create_time_ms": 1})
        return name

    return write


async def count(store: Store) -> int:
    return int(await store.read(lambda connection: connection.execute(_count).scalar_one()))


async def test_a_write_is_seen_when_it_is_confirmed_and_returns_its_result(store: Store) -> None:
    assert await store.write(add("a")) == "a"
    assert await count(store) == 1


async def test_files_are_private(store: Store, path: Path) -> None:
    await store.write(add("a"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


async def test_an_exception_undoes_only_its_own_write(store: Store) -> None:
    def half(connection: Connection) -> None:
        add("half")(connection)
        raise KeyError("no")

    writes = [store.write(add("a")), store.write(half), store.write(add("a")), store.write(add("b"))]
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert results[0] == "a"
    assert isinstance(results[1], KeyError)
    assert isinstance(results[2], TakenError)
    assert results[3] == "b"
    assert await count(store) == 2


async def test_any_exception_reaches_its_caller(store: Store) -> None:
    def stop(_: Connection) -> None:
        raise StopIteration

    with pytest.raises(RuntimeError):
        await store.write(stop)
    assert await store.write(add("a")) == "a"


async def test_concurrent_writes_share_commits_in_order(store: Store) -> None:
    threads: set[int] = set()
    order: list[int] = []

    def write(connection: Connection, number: int) -> None:
        threads.add(threading.get_ident())
        order.append(number)
        add(f"acc_{number}")(connection)

    await asyncio.gather(*(store.write(lambda c, n=number: write(c, n)) for number in range(5000)))
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert order == list(range(5000))
    assert await count(store) == 5000


async def test_cancelling_the_caller_does_not_cancel_the_write(store: Store) -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(connection: Connection) -> None:
        entered.set()
        release.wait(10)
        add("slow")(connection)

    caller = asyncio.ensure_future(store.write(slow))
    await asyncio.to_thread(entered.wait, 10)
    caller.cancel()
    with suppress(asyncio.CancelledError):
        await caller
    release.set()
    await store.write(add("next"))
    assert await count(store) == 2


async def test_the_queue_is_bounded_and_nothing_is_lost(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_room", asyncio.Semaphore(3))
    calls = [asyncio.ensure_future(store.write(add(f"acc_{number}"))) for number in range(50)]
    for call in calls[::7]:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    await store.write(add("last"))
    assert await count(store) >= 50 - 8


async def test_a_read_sees_one_snapshot_and_cannot_write(store: Store, path: Path) -> None:
    other = Store.open(path)

    def look(connection: Connection) -> tuple[int, int]:
        first = connection.execute(_count).scalar_one()
        raw = sqlite3.connect(path)
        raw.execute("INSERT INTO accounts VALUES ('between', '', 1)")
        raw.commit()
        raw.close()
        return first, connection.execute(_count).scalar_one()

    assert await store.read(look) == (0, 0)
    assert await count(store) == await count(other) == 1
    with pytest.raises(StoreError):
        await store.read(add("a"))
    assert await count(store) == 1
    other.close()


async def test_two_processes_write_in_turn(store: Store, path: Path) -> None:
    other = Store.open(path)
    await asyncio.gather(*(s.write(add(f"{n}_{id(s)}")) for n in range(200) for s in (store, other)))
    assert await count(store) == 400
    other.close()


async def test_closing_finishes_what_was_accepted_and_refuses_more(path: Path) -> None:
    store = Store.open(path)
    calls = [asyncio.ensure_future(store.write(add(f"acc_{number}"))) for number in range(100)]
    await asyncio.sleep(0)
    store.close()
    assert len(await asyncio.gather(*calls)) == 100
    for action in (store.write(add("more")), store.read(lambda connection: None)):
        with pytest.raises(StoreError):
            await action
    store.close()
    reopened = Store.open(path)
    assert await count(reopened) == 100
    reopened.close()


async def test_a_full_disk_is_told_and_passes(store: Store) -> None:
    raw = store._raw
    # SQLite's own limit gives the same SQLITE_FULL as the disk, without a disk to fill.
    await store.write(add("before"))
    pages = raw.execute("PRAGMA page_count").fetchone()[0]
    raw.execute(f"PRAGMA max_page_count = {pages}")
    big = "x" * 2_000_000

    def too_big(connection: Connection) -> None:
        connection.execute(insert(accounts), {"id": "big", "name": big, "create_time_ms": 1})

    results = await asyncio.gather(store.write(too_big), store.write(too_big), return_exceptions=True)
    for result in results:
        assert isinstance(result, StoreError)
        assert result.code == 503
        assert result.message.startswith("cannot write to the store")
    raw.execute("PRAGMA max_page_count = 1073741823")
    await store.write(too_big)
    assert await count(store) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


async def test_a_disk_that_is_really_full_is_told_and_passes(small_disk: Path) -> None:
    store = Store.open(small_disk / FILE_NAME)
    filler = small_disk / "filler"
    with suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"x" * 4096)
            file.flush()
    confirmed = 0
    with pytest.raises(StoreError):  # noqa: PT012 (which of the writes is refused is SQLite's choice)
        while confirmed < 10_000:
            await store.write(add(f"full_{confirmed}"))
            confirmed += 1
    assert await count(store) == confirmed
    filler.unlink()
    await store.write(add("after"))
    assert await count(store) == confirmed + 1
    store.close()


WRITER = """
import asyncio, sys
from pathlib import Path
from sqlalchemy import insert
from devboxd.store.db import Store
from devboxd.store.schema import accounts

async def main():
    store = Store.open(Path(sys.argv[1]))
    async def write(lane):
        for number in range(1_000_000):
            name = f"{lane}_{number}"
            row = {"id": name, "name": "x" * 200, "create_time_ms": 1}
            await store.write(lambda connection: connection.execute(insert(accounts), row) and None)
            sys.stdout.write(name + "\\n")
            sys.stdout.flush()
    await asyncio.gather(*(write(lane) for lane in range(8)))

asyncio.run(main())
"""


def _confirmed_before_sigkill(path: Path, lines: int) -> list[str]:
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        confirmed = [child.stdout.readline() for _ in range(lines)]
        child.send_signal(signal.SIGKILL)
        return confirmed + child.stdout.readlines()


@pytest.mark.parametrize("lines", [1, 50, 700])
async def test_every_confirmed_write_survives_sigkill(path: Path, lines: int) -> None:
    confirmed = await asyncio.to_thread(_confirmed_before_sigkill, path, lines)
    names = {line.strip() for line in confirmed if line.endswith("\n")}
    store = Store.open(path)
    kept = set(await store.read(lambda connection: connection.execute(select(accounts.c.id)).scalars().all()))
    assert names <= kept
    assert len(kept) <= len(names) + 8
    store.close()


async def test_the_store_is_synchronous_and_in_wal_mode(store: Store) -> None:
    for connection in (store._reader, store._writer):
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


async def test_only_writes_that_ask_for_it_wait_for_the_disk(store: Store) -> None:
    def setting(connection: Connection) -> object:
        return connection.exec_driver_sql("PRAGMA synchronous").scalar()

    assert await store.write(setting) == 2
    assert await store.write(setting, synced=False) == 1
    gate = threading.Event()
    held = asyncio.ensure_future(store.write(lambda _: gate.wait(), synced=False))
    await asyncio.sleep(0)
    together = [store.write(setting, synced=False), store.write(add("kept")), store.write(setting, synced=False)]
    waiting = asyncio.gather(*together)
    await asyncio.sleep(0)
    gate.set()
    await held
    assert await waiting == [2, "kept", 2]


def test_a_file_that_is_no_store_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(SetupError, match="cannot open the store"):
        Store.open(path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot open the store"):
        Store.open(tmp_path / "file" / FILE_NAME)


def test_a_newer_store_is_refused_and_left_alone(path: Path) -> None:
    Store.open(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(SetupError, match=f"newer devboxd.*9999.*{HEAD}"):
        Store.open(path)
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)
    raw.close()
