"""What disks share with snapshots and copies is counted to the byte, and the pool has room to write over it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.engine import btrfs, manifest, pool
from devboxd.engine.base import EngineError
from devboxd.engine.disks import Disks
from devboxd.errors import SetupError
from support.disks import upper

pytestmark = pytest.mark.box

MIB, GIB = 1 << 20, 1 << 30


@pytest.fixture
def disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disks]:
    """The disks of a pool that begins with a gigabyte, one of them with 100 MiB in it."""
    monkeypatch.setattr(pool, "_FIRST", GIB)
    opened = Disks(pool.Pool(tmp_path))
    opened.open()
    if opened.path("").parent != tmp_path or not (tmp_path / "pool.btrfs").exists():
        pytest.skip("this machine has no loop devices, no btrfs, or the folder is on btrfs itself")
    opened.create("dbx_1", 0, {}, GIB, None)
    opened.limit("dbx_1", GIB)
    _write(tmp_path, "dbx_1")
    yield opened
    for name in opened.boxes() | opened.snapshots():
        opened.remove(name)
    opened.close()


def _write(state: Path, name: str) -> None:
    """Write over the same 100 MiB, and all of it to the disk."""
    with upper(state, name) as folder:
        file = os.open(folder / "file", os.O_RDWR | os.O_CREAT)
        os.pwrite(file, os.urandom(100 * MIB), 0)
        os.fsync(file)
        os.close(file)


def _image(disks: Disks, name: str) -> Path:
    return disks.path(name) / "image"


def _blocks(disks: Disks, name: str) -> int:
    return os.stat(_image(disks, name)).st_blocks * 512


def _fill_pool(disks: Disks, leave: int) -> None:
    """By a file of the pool's own, as all other disks together might."""
    root = disks.path("").resolve()
    with (root / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, btrfs.free(root) - leave))


def test_what_takes_room_a_second_time_is_counted_to_the_byte(disks: Disks, tmp_path: Path) -> None:
    assert btrfs.shared(_image(disks, "dbx_1")) == 0, "nothing before the first snapshot"
    disks.snapshot("dbx_1", "snp_1")
    held = _blocks(disks, "dbx_1")
    assert btrfs.shared(_image(disks, "snp_1")) == held, "all after it"
    assert 0 <= held - btrfs.shared(_image(disks, "dbx_1")) < MIB, "but what the file system writes of itself"
    before = btrfs.free(disks.path(""))
    _write(tmp_path, "dbx_1")
    took = before - btrfs.free(disks.path(""))
    assert took >= 100 * MIB
    assert abs(held - btrfs.shared(_image(disks, "dbx_1")) - took) < 4 * MIB, "less, as it is written over"
    left, before = btrfs.shared(_image(disks, "dbx_1")), btrfs.free(disks.path(""))
    _write(tmp_path, "dbx_1")
    assert before - btrfs.free(disks.path("")) < MIB, "once, not twice"
    disks.remove("snp_1")
    assert abs(btrfs.shared(_image(disks, "dbx_1")) - left) < MIB, "the kernel does not look which of them has it still"


def test_it_is_found_again_by_the_next_server_for_each_disk_alone(disks: Disks, tmp_path: Path) -> None:
    disks.create("dbx_2", 1, {}, GIB, None)
    disks.limit("dbx_2", GIB)
    _write(tmp_path, "dbx_2")
    disks.snapshot("dbx_1", "snp_1")
    disks.credits.renew()
    owed = disks.credits.owed
    assert owed >= _blocks(disks, "dbx_1")
    assert owed < _blocks(disks, "dbx_1") + 100 * MIB, "nothing for the other one"
    disks.close()
    again = Disks(pool.Pool(tmp_path))
    again.open()
    for name in ("dbx_1", "dbx_2"):
        again.adopt(name, GIB)
    again.credits.renew()
    assert abs(again.credits.owed - owed) < MIB
    again.close()
    disks.open()


def test_the_pool_grows_for_what_may_be_written_over(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    disks.credits.renew()
    monkeypatch.setattr("devboxd.engine.credits._AHEAD", 0)
    _fill_pool(disks, 100 * MIB)
    disks.snapshot("dbx_1", "snp_1")
    assert btrfs.free(disks.path("")) > _blocks(disks, "dbx_1")


def test_no_snapshot_is_made_that_cannot_be_written_over(disks: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "reserve", lambda total: total)
    _fill_pool(disks, 50 * MIB)
    monkeypatch.setattr(pool, "reserve", lambda _: 0)
    monkeypatch.setattr(pool.Pool, "below", lambda _: 0)
    with pytest.raises(EngineError, match="the pool of disks is full: what is shared with a snapshot needs room"):
        disks.snapshot("dbx_1", "snp_1")
    assert not disks.snapshots()
    assert "is full" in (disks.lack("dbx_1") or "")
    (disks.path("") / "filler").unlink()
    btrfs_commit(disks)
    assert disks.lack("dbx_1") is None
    disks.snapshot("dbx_1", "snp_1")
    _fill_pool(disks, 50 * MIB)
    with pytest.raises(EngineError, match="is full"):
        disks.create("dbx_2", 1, {}, GIB, "snp_1")
    disks.remove("dbx_2")
    assert "is full" in (disks.lack("snp_1") or "")
    disks.leave("dbx_1")
    with pytest.raises(EngineError, match="is full"):
        disks.lift("dbx_1", GIB)
    disks.credits.forget("dbx_1")
    (disks.path("") / "filler").unlink()
    btrfs_commit(disks)
    disks.lift("dbx_1", GIB)


def btrfs_commit(disks: Disks) -> None:
    """Have back what was deleted."""
    pool.Pool(disks.path("").parent).commit()


def test_a_backup_has_room_while_it_reads_and_leaves_nothing_to_be_copied(
    disks: Disks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program than the server makes it."""
    beside = Disks(pool.Pool(tmp_path))
    beside._pool.look()
    disks.credits.renew()
    before = disks.credits.owed
    with beside.still(["dbx_1", "dbx_gone"]) as found:
        assert list(found) == ["dbx_1"]
        disks.credits.renew()
        assert disks.credits.owed >= before + 100 * MIB
        _write(tmp_path, "dbx_1")
        with upper(tmp_path, found["dbx_1"]) as one, upper(tmp_path, "dbx_1") as two:
            assert (one / "file").read_bytes() != (two / "file").read_bytes()
    assert btrfs.shared(_image(disks, "dbx_1")) == 0
    disks.credits.renew()
    assert disks.credits.owed < before + 100 * MIB
    assert not [path for path in disks.path("").iterdir() if path.name.startswith(".still-")]
    monkeypatch.setattr(pool.Pool, "below", lambda _: 0)
    _fill_pool(disks, 50 * MIB)
    with pytest.raises(SetupError, match="cannot copy the disks of devboxes that run"), beside.still(["dbx_1"]):
        pass
    with contextlib.suppress(FileNotFoundError):
        (disks.path("") / "filler").unlink()


@pytest.mark.anyio
async def test_a_disk_from_a_backup_shares_nothing(disks: Disks, tmp_path: Path) -> None:
    """The same archive makes a snapshot, all of which its copies share."""
    archive = tmp_path / "archive"
    with upper(tmp_path, "dbx_1") as folder:
        await manifest.archive(folder, archive)
    for name, slot in (("dbx_2", 1), ("snp_2", None)):
        await disks.restore(name, archive, GIB, slot, {})
        with upper(tmp_path, name) as folder:
            assert (folder / "file").stat().st_size == 100 * MIB
    assert btrfs.shared(_image(disks, "dbx_2")) == 0
    assert btrfs.shared(_image(disks, "snp_2")) > 100 * MIB
    assert not [path for path in disks.path("").iterdir() if path.name.startswith(".new-")]
