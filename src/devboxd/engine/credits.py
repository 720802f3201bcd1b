"""How much of the pool each open disk may still take: never more in all than there is.

A disk that the pool cannot back would meet an error of its device, which no program expects. So the file system of each
says ENOSPC before: its bound is what it holds and a credit. With room for all that was promised the credit is the
whole disk. Else what there is is shared out, and the server renews each credit as it is used. The kernel keeps the
bounds, so they hold while no server runs.

What there is: the room of the pool, and while the disk below has plenty, that too; the pool grows into it ahead of what
boxes write. With less below, or when the server ends, the room of the pool alone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from devboxd.engine.pool import Pool
from devboxd.engine.volumes import Volume

_MIB = 1 << 20
_OWN = 32 * _MIB
"""What the file system of a disk writes beside the files that it holds: its log, tables of names."""
_COPIED = 256 * _MIB
"""What is kept for a disk that writes over blocks which it shares with a snapshot: they need room a second time."""
_AHEAD = 4096 * _MIB
"""Room that the pool has ready for what boxes write between two looks, or while no server runs."""
_SCARCE = 1024 * _MIB
"""With smaller credits the kernel gives back by itself what a box deletes, also while no server runs."""
_FULL = 16 * _MIB


@dataclass
class _Disk:
    """`most`: bytes that it may hold; `volume` and `image` when it is open; `copied`: it shares blocks."""

    most: int
    volume: Volume | None = None
    image: Path | None = None
    copied: bool = False
    at_once: bool | None = None


@dataclass(frozen=True)
class _Need:
    """In bytes: `used` of its bound; `owed`, which it may take whatever its bound is; `wanted` for all of its size."""

    used: int
    owed: int
    wanted: int


class Credits:
    """The credits of one pool. Every method may be called from any thread, and may raise OSError."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._disks: dict[str, _Disk] = {}
        self._lock = threading.Lock()
        self._slack = self._owed = 0
        self.level: int | None = None
        """The largest credit, in bytes, when not all can have what their size says."""

    @property
    def exhausted(self) -> bool:
        """Whether the pool has no more room for what boxes write."""
        return self.level is not None and self.level < _FULL

    def expect(self, name: str, most: int) -> None:
        """Have room for a disk that comes, or is about to be opened."""
        with self._lock:
            known = self._disks.setdefault(name, _Disk(0))
            self._slack -= max(0, most - known.most)
            known.most = most
            if self._slack < 0:
                self._settle()

    def bound(self, name: str, volume: Volume, image: Path, most: int) -> None:
        """Let an open disk hold so many bytes, as far as the pool has them."""
        with self._lock:
            known = self._disks.setdefault(name, _Disk(0))
            self._slack -= max(0, most - known.most)
            known.most, known.volume, known.image = most, volume, image
            if self._slack < 0 or self.level is not None:
                self._settle()
            else:
                volume.bound(most)

    def share(self, name: str) -> None:
        """A disk has the blocks that it holds in common with a snapshot from now on."""
        with self._lock:
            if known := self._disks.get(name):
                known.copied = True

    def forget(self, name: str) -> None:
        """A disk was closed, or is gone."""
        with self._lock:
            self._disks.pop(name, None)

    def renew(self) -> None:
        """Look at all of them, let the pool grow ahead of them, and say anew what each may hold."""
        with self._lock:
            self._settle()

    def close(self) -> None:
        """Give none more than the pool has: it will not grow for a while."""
        with self._lock:
            self._settle(grows=False)

    def short(self) -> bool:
        """Whether the pool lacks the room for what disks that there are may write over, and for one more."""
        return self._pool.room() < self._owed + 2 * _OWN

    def _needs(self) -> list[tuple[_Disk, _Need]]:
        found = []
        for disk in self._disks.values():
            with contextlib.suppress(OSError):  # one that is broken takes nothing
                found.append((disk, _need(disk)))
        return found

    def _settle(self, *, grows: bool = True) -> None:
        needs = self._needs()
        wanted = sum(need.wanted for _, need in needs)
        self._owed = sum(need.owed for _, need in needs)
        ahead = self._owed + min(wanted, _AHEAD)
        while grows and self._pool.grow(ahead - self._pool.room()):  # a larger one keeps more for itself
            pass
        room, below = self._pool.room(), self._pool.below()
        left = room - self._owed + (below if grows and room >= ahead and below >= _AHEAD else 0)
        self._slack = left - wanted
        # A quarter for what takes the place of deleted files, whose blocks the pool has back a little later.
        level = None if self._slack >= 0 else _level((need.wanted for _, need in needs), left - left // 4)
        if level is None and self.level is None:
            return
        self.level = level
        for disk, need in needs:
            with contextlib.suppress(OSError):
                _apply(disk, need, level)


def _need(disk: _Disk) -> _Need:
    if disk.volume is None or disk.image is None:
        return _Need(0, 0, disk.most)
    used, file = disk.volume.used(), os.stat(disk.image)
    there = file.st_blocks * 512
    lacks = max(0, file.st_size - there)
    shared = min(there, _COPIED) if disk.copied else 0
    unwritten = min(lacks, max(0, used - there) + _OWN)
    return _Need(used, unwritten + shared, min(lacks, max(0, disk.most - used)))


def _level(wanted: Iterable[int], left: int) -> int:
    """The largest credit with which all that are smaller are whole, and the sum is what is left."""
    rising = sorted(wanted)
    for number, want in enumerate(rising):
        share = max(0, left) // (len(rising) - number)
        if want > share:
            return share
        left -= want
    return max(0, left)


def _apply(disk: _Disk, need: _Need, level: int | None) -> None:
    if disk.volume is None:
        return
    at_once = level is not None and level < _SCARCE
    if at_once is not disk.at_once:
        disk.volume.give_back(at_once)
        disk.at_once = at_once
    disk.volume.bound(disk.most if level is None else need.used + min(need.wanted, level))
