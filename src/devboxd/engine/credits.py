"""How much of the pool each open disk may still take: never more in all than there is.

A disk that the pool cannot back would meet an error of its device, which no program expects. So the file system of each
says ENOSPC before: its bound is what it holds and a credit. With room for all that was promised the credit is the
whole disk. Else what there is is divided (`grants.py`), and the server renews each credit as it is used. The kernel
keeps the bounds, so they hold while no server runs.

What there is: the room of the pool, and while the disk below has plenty, that too; the pool grows into it ahead of what
boxes write. With less below, or once the server has ended (`fallback.py`), the room of the pool alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from devboxd.engine.fallback import Fallback
from devboxd.engine.grants import Turn, Want, grants, level
from devboxd.engine.pool import Pool
from devboxd.engine.volumes import Volume

_MIB = 1 << 20
_OWN = 32 * _MIB
"""What the file system of a disk writes beside the files that it holds: its log, tables of names."""
_COPIED = 256 * _MIB
"""What is kept for a disk that writes over blocks which it shares with a snapshot: they need room a second time."""
_COPIED_PART = 4
"""Where more is shared, such a part of it is kept."""
_AHEAD = 4096 * _MIB
"""Room that the pool has ready for what boxes write between two looks, or while no server runs."""
_DELETED = 2048 * _MIB
"""At most so much is held back for what takes the place of deleted files, whose blocks the pool has a little later."""
_SCARCE = 1024 * _MIB
"""With smaller shares the kernel gives back by itself what a box deletes, also while no server runs."""
_FULL = 16 * _MIB
_LATELY_S = 60.0
_TRIES = 4


@dataclass
class _Disk:
    """`most`: bytes that it may hold; `volume` and `image` when it is open; `copied`: it shares blocks.

    `begun`: when it was made, opened or taken; `wrote`: when it was last seen to hold more than before, and `mark` how
    much that was; `bound`: what it may hold now.
    """

    most: int
    begun: float
    wrote: float = -math.inf
    volume: Volume | None = None
    image: Path | None = None
    copied: bool = False
    at_once: bool | None = None
    mark: int | None = None
    bound: int | None = None


@dataclass(frozen=True)
class _Need:
    """What one disk needs of the pool, in bytes.

    `used`: what counts towards its bound; `owed`: what it may take of the pool without reaching its bound; `want`: what
    it lacks to have all of its size.
    """

    disk: _Disk
    used: int
    owed: int
    want: Want

    def bound(self, grant: int) -> int:
        """Bytes that it may hold; all of its size where the room is there for each hole in it."""
        return self.used + grant if grant < self.want.bytes else self.disk.most


class Credits:
    """The credits of one pool. Every method may be called from any thread, and may raise OSError."""

    def __init__(self, pool: Pool, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = pool
        self._clock = clock
        self._disks: dict[str, _Disk] = {}
        self._lock = threading.Lock()
        self._slack = self._owed = 0
        self.fallback: Fallback | None = None
        """Given by a server, which may die."""
        self.level: int | None = None
        """The largest credit, in bytes, when not all can have what their size says."""

    @property
    def exhausted(self) -> bool:
        """Whether the pool has no more room for what boxes write."""
        return self.level is not None and self.level < _FULL

    def expect(self, name: str, most: int) -> None:
        """Have room for a disk that comes, or is about to be opened."""
        with self._lock:
            self._known(name, most)
            if self._slack < 0:
                self._settle()

    def bound(self, name: str, volume: Volume, image: Path, most: int) -> None:
        """Let an open disk hold so many bytes, as far as the pool has them."""
        with self._lock:
            known = self._known(name, most)
            known.volume, known.image, known.bound = volume, image, None
            if self._slack < 0 or self.level is not None:
                self._settle()
            else:
                volume.bound(most)
                known.bound = most

    def _known(self, name: str, most: int) -> _Disk:
        known = self._disks.setdefault(name, _Disk(0, self._clock()))
        self._slack -= max(0, most - known.most)
        known.most = most
        return known

    def wake(self, name: str) -> None:
        """A disk that waited is about to be written."""
        if known := self._disks.get(name):
            known.begun = self._clock()

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
            if self.fallback is not None:
                self._settle()
                self.fallback.close()

    def short(self) -> bool:
        """Whether the pool lacks the room for what disks that there are may write over, and for one more."""
        return self._pool.copies and self._pool.room() < self._owed + 2 * _OWN

    def _needs(self) -> list[_Need]:
        found, now = [], self._clock()
        for disk in self._disks.values():
            with contextlib.suppress(OSError):  # one that is broken takes nothing
                found.append(_need(disk, now))
        return found

    def _settle(self) -> None:
        needs = self._needs()
        wanted = sum(need.want.bytes for need in needs)
        self._owed = sum(need.owed for need in needs)
        ahead = self._owed + min(wanted, _AHEAD)
        while self._pool.grow(ahead - self._pool.room()):  # a larger one keeps more for itself
            pass
        room, below = self._pool.room(), self._pool.below()
        own = room - self._owed
        left = own + (below if room >= ahead and below >= _AHEAD else 0)
        self._slack = left - wanted
        if self._slack < 0 or self.level is not None:
            self._divide(needs, left)
        self._tell(needs, own)

    def _divide(self, needs: Sequence[_Need], left: int) -> None:
        """First those that shall hold less than before; who has written meanwhile leaves less for the others."""
        for _ in range(_TRIES):
            usable = left if self._slack >= 0 else left - min(max(0, left) // 4, _DELETED)
            given = grants([need.want for need in needs], usable)
            bounds = [need.bound(grant) for need, grant in zip(needs, given, strict=True)]
            lowered = [
                (need, bound)
                for need, bound in zip(needs, bounds, strict=True)
                if need.disk.bound is None or bound < need.disk.bound
            ]
            for need, bound in lowered:
                _bound(need.disk, bound)
            late = sum(_above(need.disk, bound) for need, bound in lowered)
            if not late:
                break
            left -= late
        self.level = None if self._slack >= 0 else max(given, default=0)
        at_once = self.level is not None and level([need.want.bytes for need in needs], usable) < _SCARCE
        for need, bound in zip(needs, bounds, strict=True):
            _bound(need.disk, bound)
            _give_back(need.disk, at_once)

    def _tell(self, needs: Sequence[_Need], own: int) -> None:
        """What shall hold without a server, which alone lets the pool grow and sees who writes."""
        if self.fallback is None:
            return
        given = grants([Want(need.want.bytes) for need in needs], own - max(0, own) // 4)
        kept = {}
        for need, grant in zip(needs, given, strict=True):
            if volume := need.disk.volume:
                with contextlib.suppress(OSError):
                    kept[volume.device] = volume.kept(need.bound(grant))
        self.fallback.tell(kept)


def _need(disk: _Disk, now: float) -> _Need:
    if disk.volume is None or disk.image is None:
        return _Need(disk, 0, 0, Want(disk.most, Turn.BEGINS))
    used, file = disk.volume.used(), os.stat(disk.image)
    if disk.mark is not None and used > disk.mark + _MIB:
        disk.wrote, disk.mark = now, used
    disk.mark = used if disk.mark is None else min(disk.mark, used)
    there = file.st_blocks * 512
    lacks = max(0, file.st_size - there)
    shared = min(there, max(_COPIED, there // _COPIED_PART)) if disk.copied else 0
    unwritten = min(lacks, max(0, used - there) + _OWN)
    want = min(lacks, max(0, disk.most - used))
    return _Need(disk, used, unwritten + shared, Want(want, _turn(disk, now)))


def _turn(disk: _Disk, now: float) -> Turn:
    if now - disk.wrote < _LATELY_S:
        return Turn.WRITES
    return Turn.BEGINS if now - disk.begun < _LATELY_S else Turn.RESTS


def _bound(disk: _Disk, bound: int) -> None:
    if disk.volume is not None and bound != disk.bound:
        with contextlib.suppress(OSError):
            disk.volume.bound(bound)
            disk.bound = bound


def _above(disk: _Disk, bound: int) -> int:
    """By how many bytes a disk holds more than it may, because it wrote while that was said."""
    with contextlib.suppress(OSError):
        return max(0, disk.volume.used() - bound) if disk.volume else 0
    return 0


def _give_back(disk: _Disk, at_once: bool) -> None:
    if disk.volume is not None and at_once is not disk.at_once:
        with contextlib.suppress(OSError):
            disk.volume.give_back(at_once)
            disk.at_once = at_once
