"""The pool of disks in a file: it grows before it is full, is found again, and is never attached twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.engine import pool, spares
from devboxd.engine.disks import Disks

pytestmark = pytest.mark.box
GIB = 1 << 30


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder whose pool begins with a gigabyte, and grows at once."""
    monkeypatch.setattr(pool, "_FIRST", GIB)
    one = pool.Pool(tmp_path)
    one.open()
    if one.kind != "file":
        one.close()
        pytest.skip("this machine has no loop devices, no btrfs, or the folder is on btrfs itself")
    yield tmp_path
    one.close()


def test_it_grows_while_it_is_in_use_and_keeps_what_it_holds(state: Path) -> None:
    found = pool.Pool(state)
    found.open()
    disks = Disks(found)
    disk = disks.create("dbx_1", 7, {"etc/hostname": "one"}, None)
    with (disk / "upper" / "open").open("w+") as file:
        file.write("before")
        assert found.grow()
        file.write(" and after")
    assert found.file.stat().st_size == 2 * GIB
    assert shutil.disk_usage(found.folder).total == 2 * GIB
    assert (disk / "upper" / "open").read_text() == "before and after"
    assert disks.slot("dbx_1") == 7


def test_it_is_found_again_with_its_one_device(state: Path) -> None:
    found = pool.Pool(state)
    found.open()
    disks = Disks(found)
    disks.create("dbx_1", 0, {}, None)
    disks.snapshot("dbx_1", "snp_1")
    assert len(list(pool._devices(found.file))) == 1
    found.close()
    again = pool.Pool(state)
    again.open()
    assert len(list(pool._devices(found.file))) == 1
    assert (Disks(again).boxes(), Disks(again).snapshots()) == ({"dbx_1"}, {"snp_1"})


def test_it_does_not_grow_into_what_is_kept_for_the_server(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool.Pool(state)
    found.open()
    monkeypatch.setattr(pool, "reserve", lambda total: total)
    assert not found.grow()
    assert "full" in (found.short_of() or "")


def test_a_pool_without_any_room_gives_it_back(state: Path) -> None:
    """Where not even a name can be made any more, removing is what helps, so it must need no room."""
    found = pool.Pool(state)
    found.open()
    disks = Disks(found)
    full = disks.create("dbx_1", 0, {}, None)
    disks.create("dbx_2", 1, {}, None)
    _fill(full / "upper")
    with pytest.raises(OSError, match="No space left"):
        disks.create("dbx_3", 2, {}, None)
    disks.remove("dbx_1")
    assert disks.boxes() == {"dbx_2"}
    for command in ("filesystem", "subvolume"):
        subprocess.run(["btrfs", command, "sync", found.folder], check=True, capture_output=True)
    disks.create("dbx_3", 2, {}, None)


def test_it_has_room_for_all_that_it_promised(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fallocate` takes a whole disk in a moment, long before anybody looks."""
    monkeypatch.setattr(pool, "_MARGIN", 0)
    found = pool.Pool(state)
    found.open()
    disks = Disks(found)
    for number in range(2):
        disk = disks.create(f"dbx_{number}", number, {}, None)
        disks.limit(f"dbx_{number}", 3 * GIB)
    with (disk / "upper" / "large").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 * GIB)
    assert shutil.disk_usage(found.folder).free > 3 * GIB
    found.close()
    again = pool.Pool(state)
    Disks(again).open()
    assert shutil.disk_usage(again.folder).free > 6 * GIB, "what was promised is found again"
    for name in ("dbx_0", "dbx_1"):
        Disks(again).remove(name)
    monkeypatch.setattr(pool, "_MARGIN", shutil.disk_usage(again.folder).free - GIB)
    assert not again.grow(), "nothing is promised to those that are gone"


def test_a_full_pool_takes_no_new_disks(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the disk below has room, which the pool may not take."""
    found = pool.Pool(state)
    found.open()
    disk = Disks(found).create("dbx_1", 0, {}, None)
    assert found.short_of() is None
    with (disk / "upper" / "data").open("wb") as file, contextlib.suppress(OSError):
        for size in itertools.count(1):
            os.posix_fallocate(file.fileno(), 0, size << 24)
    assert "the pool of disks is full" in (found.short_of() or "")


def test_a_copy_that_waits_becomes_the_next_disk_and_goes_with_its_snapshot(state: Path) -> None:
    found = pool.Pool(state)
    disks = Disks(found)
    disks.open()
    first = disks.create("dbx_1", 0, {}, None)
    (first / "upper" / "file").write_text("kept")
    disks.snapshot("dbx_1", "snp_1")
    disks.spare("snp_1")
    disks.spare("snp_1")
    assert _spares(state) == {"snp_1"}
    second = disks.create("dbx_2", 1, {"etc/hostname": "two"}, "snp_1")
    assert _spares(state) == set()
    assert (second / "upper" / "file").read_text() == "kept"
    (second / "upper" / "file").write_text("changed")
    third = disks.create("dbx_3", 2, {}, "snp_1")
    assert (third / "upper" / "file").read_text() == "kept"
    disks.spare("snp_1")
    disks.remove("snp_1")
    disks.spare("snp_1")
    assert _spares(state) == set()
    disks.snapshot("dbx_1", "snp_2")
    disks.spare("snp_2")
    Disks(found).open()  # as the next server does
    assert _spares(state) == set()


@pytest.mark.anyio
async def test_copies_wait_for_the_snapshots_that_were_used_last(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_REST_S", 0.0)
    disks = Disks(pool.Pool(state))
    await asyncio.to_thread(disks.open)
    await asyncio.to_thread(disks.create, "dbx_1", 0, {}, None)
    names = [f"snp_{number}" for number in range(10)]
    kept = spares.Spares(disks)
    keeping = asyncio.create_task(kept.keep())
    for name in names:
        await asyncio.to_thread(disks.snapshot, "dbx_1", name)
        kept.used(name)
    kept.used(names[0])
    while _spares(state) != {names[0], *names[-7:]}:
        assert not keeping.done()
        await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.wait({keeping})


def _spares(state: Path) -> set[str]:
    return {path.name.removeprefix(".spare-") for path in (state / "disks").glob(".spare-*")}


def _fill(folder: Path) -> None:
    """Take the room for data, then that for names, by attributes of which few do."""
    with (folder / "data").open("wb") as file:
        size = 0
        for step in (64 << 20, 1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), size, step)
                    size += step
    for size in (15000, 1000, 1):
        with contextlib.suppress(OSError):
            for number in itertools.count():
                os.setxattr(folder / "data", f"user.{size}.{number}", bytes(size))


_GROWING = """
import os, signal, sys
from pathlib import Path
from devboxd.engine import pool, spares

found, steps, lines = pool.Pool(Path(sys.argv[1])), int(sys.argv[2]), 0
found.open()

def trace(frame, event, argument):
    global lines
    if frame.f_code.co_filename.endswith(("engine/pool.py", "engine/btrfs.py")):
        lines += event == "line"
        if lines == steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

sys.settrace(trace)
found.grow()
"""


def test_a_growth_that_a_kill_cut_is_finished_where_there_is_no_more_room(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program dies at one line after the other, until it lives to the end; the next one has all of the file."""
    found = pool.Pool(state)
    found.open()
    (found.folder / "kept").write_text("kept" * 100_000)
    done, step, cut = False, 0, 0
    while not done:
        step += 3
        done = subprocess.run([sys.executable, "-c", _GROWING, state, str(step)], check=False).returncode == 0
        cut += shutil.disk_usage(found.folder).total < found.file.stat().st_size
        if step % 2:  # as after a restart of the machine
            found.close()
        found.open()
        with monkeypatch.context() as full:
            full.setattr(pool, "reserve", lambda total: total)
            found.grow()
        assert shutil.disk_usage(found.folder).total == found.file.stat().st_size
        assert (found.folder / "kept").read_text() == "kept" * 100_000
        found.close()
        if found.file.stat().st_size > GIB and not done:
            found.file.unlink()
            found.open()
            (found.folder / "kept").write_text("kept" * 100_000)
    assert cut, "no kill came between the file and what is in it"
