"""The pool of disks in a file: it grows before it is full, is found again, and is never attached twice."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from devboxd.engine import btrfs, loops, pool, spares, volumes
from devboxd.engine.disks import Disks
from devboxd.errors import SetupError
from support.disks import upper, volumes_of

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
    for name in Disks(one).boxes():
        Disks(one).remove(name)
    one.close()


def test_it_grows_while_it_is_in_use_and_keeps_what_it_holds(state: Path) -> None:
    found = pool.Pool(state)
    found.open()
    disks = Disks(found)
    disks.create("dbx_1", 7, {"etc/hostname": "one"}, GIB, None)
    before = found.file.stat().st_size
    with upper(state, "dbx_1") as folder, (folder / "open").open("w+") as file:
        file.write("before")
        assert found.grow(1)
        file.write(" and after")
    assert found.file.stat().st_size == shutil.disk_usage(found.folder).total == before + GIB
    disks.close()
    found.open()
    with upper(state, "dbx_1") as folder:
        assert (folder / "open").read_text() == "before and after"
        assert (folder / "etc/hostname").read_text() == "one"
    assert disks.slot("dbx_1") == 7


def test_it_is_found_again_with_its_one_device(state: Path) -> None:
    found = pool.Pool(state)
    found.open()
    disks = Disks(found)
    disks.create("dbx_1", 0, {}, GIB, None)
    disks.snapshot("dbx_1", "snp_1")
    assert len(_devices(found.file)) == 1
    found.close()
    again = pool.Pool(state)
    again.open()
    assert len(_devices(found.file)) == 1
    assert (Disks(again).boxes(), Disks(again).snapshots()) == ({"dbx_1"}, {"snp_1"})
    image = disks.path("dbx_1") / "image"
    with loops.attached(image) as one, upper(state, "dbx_1"), loops.attached(image) as two:
        assert one == two, "the device that the first one left in use"
    disks.remove("dbx_1")
    assert not volumes_of(state)


def test_it_does_not_grow_into_what_is_kept_for_the_server(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pool.Pool(state)
    found.open()
    monkeypatch.setattr(pool, "reserve", lambda total: total)
    assert not found.grow(GIB)
    assert "full" in (found.short_of() or "")


def test_a_pool_without_any_room_gives_it_back(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removing is what helps there, so it must need none."""
    found = pool.Pool(state)
    found.open()
    monkeypatch.setattr(pool, "reserve", lambda total: total)
    disks = Disks(found)
    disks.create("dbx_1", 0, {}, GIB, None)
    with upper(state, "dbx_1") as folder:
        (folder / "much").write_bytes(os.urandom(200 << 20))
        os.sync()
    disks.create("dbx_2", 1, {}, GIB, None)
    _fill(found.folder)
    with pytest.raises(OSError, match=r"No space left|Input/output error"):
        disks.create("dbx_3", 2, {}, 2 * GIB, None)
    disks.remove("dbx_3")
    disks.remove("dbx_1")
    assert disks.boxes() == {"dbx_2"}
    for command in ("filesystem", "subvolume"):
        subprocess.run(["btrfs", command, "sync", found.folder], check=True, capture_output=True)
    disks.create("dbx_3", 2, {}, GIB, None)


def test_it_has_room_for_all_that_it_promised(state: Path) -> None:
    found = pool.Pool(state)
    disks = Disks(found)
    disks.open()
    for number in range(2):
        disks.create(f"dbx_{number}", number, {}, 2 * GIB, None)
        disks.limit(f"dbx_{number}", 3 * GIB)
    disks.credits.renew()
    assert found.room() > 4 * GIB, "what is written between two looks"
    assert found.holes == 0
    size = found.file.stat().st_size
    for name in ("dbx_0", "dbx_1"):
        disks.remove(name)
    disks.credits.renew()
    assert found.file.stat().st_size == size, "nothing is promised to those that are gone"


def test_no_block_leaves_it_for_long(state: Path) -> None:
    """None by what is deleted in it; those that a trim of the whole machine takes come back with the next look."""
    found = pool.Pool(state)
    found.open()
    (found.folder / "much").write_bytes(os.urandom(100 << 20))
    os.sync()
    (found.folder / "much").unlink()
    subprocess.run(["btrfs", "filesystem", "sync", found.folder], check=True, capture_output=True)
    assert found.holes == 0
    subprocess.run(["fstrim", found.folder], check=True)
    assert found.holes > 0
    found.fill()
    assert found.holes == 0
    assert "discard" not in linux_options(found.folder).replace("nodiscard", "")


def linux_options(folder: Path) -> str:
    """The options of the mount at a folder."""
    (line,) = [line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[1] == str(folder)]
    return line.split()[3]


def test_a_sparse_one_of_an_earlier_version_gets_its_blocks(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the disk below has them; meanwhile no more is promised than there is."""
    found = pool.Pool(state)
    found.open()
    (found.folder / "kept").write_text("kept" * 100_000)
    found.close()
    with loops.attached(found.file):
        pass  # it is free again
    with found.file.open("r+b") as file:
        size = file.seek(0, os.SEEK_END) + (16 << 30) + 4711  # no multiple of any block, as they were made
        file.truncate(size)
    with monkeypatch.context() as full:
        full.setattr(pool, "reserve", lambda total: total)
        found.open()
        assert found.holes > GIB
        assert found.room() < 0
        found.close()
    found.open()
    assert found.holes == 0
    assert found.file.stat().st_size % 4096 == 0
    assert (found.folder / "kept").read_text() == "kept" * 100_000


def test_a_device_of_the_pool_can_be_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the kernel's log says "Buffer I/O error" to all that look at it; the disk below has an odd size."""
    monkeypatch.setattr(pool.Pool, "below", lambda _: (1 << 30) + (64 << 20) + 4711)
    found = pool.Pool(tmp_path)
    found.open()
    with loops.attached(found.file) as device, open(device, "rb") as content:
        size = content.seek(-4096, os.SEEK_END) + 4096
        assert len(content.read()) == 4096
        assert size == found.file.stat().st_size
    found.close()


def test_a_full_pool_takes_no_new_disks(state: Path) -> None:
    """Also while the disk below has room, which the pool may not take."""
    found = pool.Pool(state)
    found.open()
    disks = Disks(found)
    assert not disks.credits.short()
    with (found.folder / "data").open("wb") as file, contextlib.suppress(OSError):
        for size in itertools.count(1):
            os.posix_fallocate(file.fileno(), 0, size << 24)
    assert disks.credits.short()


def test_a_copy_that_waits_becomes_the_next_disk_and_goes_with_its_snapshot(state: Path) -> None:
    found = pool.Pool(state)
    disks = Disks(found)
    disks.open()
    disks.create("dbx_1", 0, {}, GIB, None)
    with upper(state, "dbx_1") as first:
        (first / "file").write_text("kept")
    disks.snapshot("dbx_1", "snp_1")
    disks.spare("snp_1")
    disks.spare("snp_1")
    assert _spares(state) == {"snp_1"}
    disks.create("dbx_2", 1, {"etc/hostname": "two"}, GIB, "snp_1")
    assert _spares(state) == set()
    with upper(state, "dbx_2") as second:
        assert (second / "file").read_text() == "kept"
        (second / "file").write_text("changed")
    disks.create("dbx_3", 2, {}, GIB, "snp_1")
    for name in ("dbx_3", "snp_1"):
        with upper(state, name) as third:
            assert (third / "file").read_text() == "kept"
    disks.spare("snp_1")
    disks.remove("snp_1")
    disks.spare("snp_1")
    assert _spares(state) == set()
    disks.snapshot("dbx_1", "snp_2")
    disks.spare("snp_2")
    disks.close()
    disks.open()  # as the next server does
    assert _spares(state) == set()


def test_the_server_goes_on_while_the_pool_writes_a_snapshot_down(state: Path) -> None:
    """The kernel waits for the disk then; no other thread may wait with it."""
    found = pool.Pool(state)
    source = found.folder / "source"
    btrfs.create(source)
    stood = []
    for number in range(8):
        (source / "much").write_bytes(os.urandom(64 << 20))
        begun = time.monotonic()
        taking = threading.Thread(target=btrfs.snapshot, args=(source, found.folder / f"copy-{number}"), kwargs=COPY)
        taking.start()
        longest, looked = 0.0, begun
        while taking.is_alive():
            time.sleep(0.001)
            looked, longest = time.monotonic(), max(longest, time.monotonic() - looked)
        taking.join()
        stood.append(longest / (time.monotonic() - begun))
    for path in found.folder.iterdir():
        btrfs.delete(path)
    assert min(stood) < 0.5, "of the time that a snapshot takes"


COPY = {"read_only": True}


def test_empty_disks_wait_for_boxes_and_only_for_this_server(state: Path) -> None:
    disks = Disks(pool.Pool(state))
    disks.open()
    disks.stock(GIB)
    waiting = _empty(state)
    assert len(waiting) > 1
    disks.create("dbx_1", 0, {}, GIB, None)
    disks.create("dbx_2", 0, {}, 2 * GIB, None)
    assert len(waiting - _empty(state)) == 1
    with upper(state, "dbx_1") as one, upper(state, "dbx_2") as two:
        sizes = [os.statvfs(folder).f_blocks * 4096 for folder in (one, two)]
        assert GIB < sizes[0] < 2 * GIB < sizes[1] < 3 * GIB
        assert [list(folder.iterdir()) for folder in (one, two)] == [[], []]
    disks.close()
    disks.open()
    assert _empty(state) == set()


def test_a_copy_of_a_disk_may_be_larger_or_smaller(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool.Pool, "below", lambda _: 100 * GIB)
    disks = Disks(pool.Pool(state))
    disks.open()
    disks.create("dbx_1", 0, {}, 2 * GIB, None)
    with upper(state, "dbx_1") as folder:
        (folder / "file").write_text("kept")
    disks.snapshot("dbx_1", "snp_1")
    for number, size in enumerate((64 * GIB, 2 * GIB, 4 * GIB, GIB)):
        name = f"dbx_{number}0"
        disks.create(name, 0, {}, size, "snp_1")
        disks.limit(name, size)
        with upper(state, name) as folder:
            found = os.statvfs(folder)
            assert abs((found.f_blocks - found.f_bfree + found.f_bavail) * 4096 - size) < 8192
            assert (folder / "file").read_text() == "kept"
            (folder / "file").write_text("changed")
    with upper(state, "snp_1") as folder:
        assert (folder / "file").read_text() == "kept"


def test_a_disk_has_an_end_of_names_too(state: Path) -> None:
    file = state / "disks" / "image"
    volume = volumes.make(file, 64 << 20)
    try:
        assert volume.room() > 0.9
        with pytest.raises(OSError, match="No space left"):
            _name(volume.path / "upper", range(20_000))
        assert volume.room() == 0
        (volume.path / "upper" / "7").unlink()
        (volume.path / "upper" / "again").touch()
    finally:
        volume.drop()
        volume.close()


def test_disks_of_an_earlier_version_are_refused_and_stay(state: Path) -> None:
    found = pool.Pool(state)
    found.open()
    btrfs.create(found.folder / "dbx_old")
    (found.folder / "dbx_old" / "upper").mkdir()
    (found.folder / "dbx_old" / "upper" / "file").write_text("kept")
    with pytest.raises(SetupError, match="an earlier version of devboxd wrote dbx_old; make a backup by that version"):
        Disks(found).open()
    assert (found.folder / "dbx_old" / "upper" / "file").read_text() == "kept"
    btrfs.delete(found.folder / "dbx_old")


def test_empty_disks_that_cannot_be_made_leave_nothing(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = Disks(pool.Pool(state))
    disks.open()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(volumes, "copy", refuse)
    for _ in range(3):
        with pytest.raises(OSError, match="no room"):
            disks.create("dbx_1", 0, {}, GIB, None)
        disks.remove("dbx_1")
    assert _empty(state) == {f".empty-{GIB}"}


def test_a_disk_is_let_go_where_no_program_can_be_started(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disks = Disks(pool.Pool(state))
    disks.open()
    disks.create("dbx_1", 0, {}, GIB, None)
    with upper(state, "dbx_1") as folder:
        (folder / "file").write_text("kept")
    with monkeypatch.context() as without:
        without.setenv("PATH", str(state))
        assert disks.leave("dbx_1") is None
    assert volumes_of(state) == []
    with upper(state, "dbx_1") as folder:
        assert (folder / "file").read_text() == "kept"


def test_a_snapshot_that_a_kill_cut_lets_the_box_go_on(state: Path) -> None:
    """The kernel holds a file system for as long as nobody says otherwise, whatever became of who asked for it."""
    disks = Disks(pool.Pool(state))
    disks.open()
    disks.create("dbx_1", 0, {}, GIB, None)
    subprocess.run([sys.executable, "-c", _SNAPSHOT, state], check=False)
    with upper(state, "dbx_1") as folder:
        writing = subprocess.Popen(["touch", folder / "held"])
        with pytest.raises(subprocess.TimeoutExpired):
            writing.wait(0.2)
        disks.adopt("dbx_1", GIB)
        assert writing.wait(60) == 0
        subprocess.run([sys.executable, "-c", _SNAPSHOT, state], check=False)
        disks.snapshot("dbx_1", "snp_1")
        assert subprocess.run(["touch", folder / "on"], check=False, timeout=60).returncode == 0
    with upper(state, "snp_1") as folder:
        assert {path.name for path in folder.iterdir()} == {"held"}


_SNAPSHOT = """
import os, signal, sys
from pathlib import Path
from devboxd.engine import btrfs, disks, pool

btrfs.snapshot = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
found = pool.Pool(Path(sys.argv[1]))
found.look()
disks.Disks(found).snapshot("dbx_1", "snp_1")
"""


@pytest.mark.anyio
async def test_copies_wait_for_the_snapshots_that_were_used_last(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_REST_S", 0.0)
    disks = Disks(pool.Pool(state))
    await asyncio.to_thread(disks.open)
    await asyncio.to_thread(disks.create, "dbx_1", 0, {}, GIB, None)
    names = [f"snp_{number}" for number in range(10)]
    kept = spares.Spares(disks)
    keeping = asyncio.create_task(kept.keep())
    for name in names:
        await asyncio.to_thread(disks.snapshot, "dbx_1", name)
        kept.used(name, GIB)
    kept.used(names[0], GIB)
    while _spares(state) != {names[0], *names[-7:]}:
        assert not keeping.done()
        await asyncio.sleep(0.01)
    keeping.cancel()
    await asyncio.wait({keeping})


def _spares(state: Path) -> set[str]:
    return {path.name.removeprefix(".spare-") for path in (state / "disks").glob(".spare-*")}


def _empty(state: Path) -> set[str]:
    return {path.name for path in (state / "disks").glob(".empty-*")}


def _devices(file: Path) -> list[Path]:
    return [
        path for path in Path("/sys/block").glob("loop*/loop/backing_file") if path.read_text().strip() == str(file)
    ]


def _name(folder: Path, numbers: Iterable[int]) -> None:
    for number in numbers:
        (folder / str(number)).touch()


def _fill(folder: Path) -> None:
    with (folder / "data").open("wb") as file:
        size = 0
        for step in (64 << 20, 1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    os.posix_fallocate(file.fileno(), size, step)
                    size += step


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
found.grow(1)
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
            found.grow(1)
        assert shutil.disk_usage(found.folder).total == found.file.stat().st_size
        assert (found.folder / "kept").read_text() == "kept" * 100_000
        found.close()
        if found.file.stat().st_size > GIB and not done:
            found.file.unlink()
            found.open()
            (found.folder / "kept").write_text("kept" * 100_000)
    assert cut, "no kill came between the file and what is in it"
