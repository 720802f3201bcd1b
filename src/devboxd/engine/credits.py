"""How much of the pool each open disk may still take: never more in all than there is.

A disk that the pool cannot back would meet an error of its device, which no program expects. So the file system of each
says ENOSPC before: its bound is what it holds and a credit. With room for all that was promised the credit is the
whole disk. Else what there is is divided (`grants.py`), and the server renews each credit as it is used. The kernel
keeps the bounds, so they hold while no server runs.

What there is: the room of the pool, and while the disk below has plenty, that too; the pool grows into it ahead of what
boxes write. With less below, or once the server has ended (`fallback.py`), the room of the pool alone.

No bound stops a disk from writing over what it holds, and where that is older than a snapshot it takes room a second
time. So the pool itself has room for all of that, or there is no snapshot, and nothing begins from one.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from devboxd.engine import btrfs, loops
from devboxd.engine.base import EngineError
from devboxd.engine.fallback import Fallback
from devboxd.engine.grants import Turn, Want, grants, level
from devboxd.engine.pool import Pool
from devboxd.engine.volumes import Volume
from devboxd.errors import SetupError

_MIB = 1 << 20
_OWN = 32 * _MIB
"""What the file system of a disk writes beside the files that it holds: its log, tables of names."""
_BESIDE = 256 * _MIB
"""What shall be left to all disks beside what one more is to share, or as much as that where it is less."""
_MEASURE_S = 1.0
"""So often one of the disks is looked at anew, when not all can have what their size says."""
_AHEAD = 4096 * _MIB
"""Room that the pool has ready for what boxes write between two looks, or while no server runs."""
_DELETED = 2048 * _MIB
"""At most so much is held back for what takes the place of deleted files, whose blocks the pool has a little later."""
_SCARCE = 1024 * _MIB
"""With smaller shares the kernel gives back by itself what a box deletes, also while no server runs."""
_FULL = 16 * _MIB
STILL = ".still-"
"""How the copy of a disk is named that a backup reads; the disk shares all with it as long as it is there."""
_LATELY_S = 60.0
_TRIES = 4


@dataclass
class _Disk:
    """`most`: bytes that it may hold; `volume` and `image` when it is open.

    `shared`: at most so many bytes take room a second time when they are written over; `measured`: when that was found.
    `begun`: when it was made, opened or taken; `wrote`: when it was last seen to hold more than before, and `mark` how
    much that was; `bound`: what it may hold now.
    """

    most: int
    begun: float
    wrote: float = -math.inf
    volume: Volume | None = None
    image: Path | None = None
    shared: int = 0
    measured: float = -math.inf
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
        self._slack = 0
        self.owed = 0
        """Bytes of the pool that disks may take without reaching their bounds, when they were last looked at."""
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
            if known.measured == -math.inf:
                known.shared, known.measured = btrfs.shared(image), self._clock()
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

    def share(self, name: str, shared: int) -> None:
        """Have room for a disk that is to be opened to write over so many bytes. Raises EngineError."""
        with self._sharing(self._disks[name], shared):
            pass

    @contextlib.contextmanager
    def sharing(self, name: str) -> Iterator[None]:
        """Have room for a disk to write over all that it holds: a snapshot of it is made in the block.

        One that is not open writes nothing. Raises EngineError.
        """
        disk = self._disks.get(name)
        if disk is None or disk.image is None:
            yield
            return
        with self._sharing(disk, os.stat(disk.image).st_blocks * 512):
            yield

    @contextlib.contextmanager
    def _sharing(self, disk: _Disk, shared: int) -> Iterator[None]:
        with self._lock:
            before = disk.shared, disk.measured
            if (more := shared - disk.shared) > 0 and not self._grown_for(more):
                raise EngineError(self._full(more))
            disk.shared, disk.measured = shared, self._clock()
            self._settle()
        try:
            yield
        except BaseException:
            disk.shared, disk.measured = before
            raise

    def _grown_for(self, more: int) -> bool:
        """Whether the pool has room for so much more than what it owes, at last by growing."""
        needed = sum(need.owed for need in self._needs()) + more + min(more, _BESIDE)
        while self._pool.grow(needed - self._pool.room()):
            pass
        return self._pool.room() >= needed

    def forget(self, name: str) -> None:
        """A disk was closed, or is gone."""
        with self._lock:
            self._disks.pop(name, None)

    def renew(self) -> None:
        """Look at all of them, let the pool grow ahead of them, and say anew what each may hold."""
        if self.level is not None:
            self._measure()
        with self._lock:
            self._settle()

    def _measure(self) -> None:
        """Look anew what one disk shares, of those that share something the one that waits longest."""
        with self._lock:
            sharing = [disk for disk in self._disks.values() if disk.shared and disk.image is not None]
        disk = min(sharing, key=lambda disk: disk.measured, default=None)
        if disk is None or disk.image is None or self._clock() - max(d.measured for d in sharing) < _MEASURE_S:
            return
        before = disk.measured
        with contextlib.suppress(OSError):
            shared = btrfs.shared(disk.image)
            with self._lock:
                if disk.measured == before:  # else a snapshot was made meanwhile
                    disk.shared, disk.measured = min(shared, disk.shared), self._clock()

    def close(self) -> None:
        """Give none more than the pool has: it will not grow for a while."""
        with self._lock:
            if self.fallback is not None:
                self._settle()
                self.fallback.close()

    def short(self) -> bool:
        """Whether the pool lacks the room for what disks that there are may write over, and for one more."""
        return self._pool.copies and self._pool.room() < self.owed + 2 * _OWN

    def lack(self, name: str, shared: int) -> str | None:
        """Why there is no room to write over so many bytes of a disk, though the pool may grow; None when there is."""
        known = self._disks.get(name)
        more = shared - (known.shared if known else 0)
        room = self._pool.room() + max(0, self._pool.below())
        return self._full(more) if more > 0 and room < self.owed + more + min(more, _BESIDE) else None

    def _full(self, more: int) -> str:
        left = max(0, self._pool.room() + max(0, self._pool.below()) - self.owed - _BESIDE)
        return (
            "the pool of disks is full: what is shared with a snapshot needs room to be written over, "
            f"{more >> 20} MiB here, and {left >> 20} MiB are left"
        )

    def check_copies(self, images: Iterable[Path]) -> None:
        """See that there is room to write over all of these disks that are attached, while copies of them are read.

        For a program beside the server, which keeps that room as long as it sees the copies. Raises SetupError.
        """
        attached, needed = {file for _, file in loops.devices()}, 0
        for image in images:
            with contextlib.suppress(FileNotFoundError):
                needed += image.stat().st_blocks * 512 if "/".join(image.parts[-2:]) in attached else 0
        if needed > (room := max(0, self._pool.room()) + max(0, self._pool.below())):
            raise SetupError(
                f"cannot copy the disks of devboxes that run: what they may write over meanwhile needs {needed >> 20} "
                f"MiB of room in the pool of disks, which has {room >> 20} MiB; suspend some, or make room"
            )

    def _needs(self) -> list[_Need]:
        found, now = [], self._clock()
        for disk in self._disks.values():
            with contextlib.suppress(OSError):  # one that is broken takes nothing
                found.append(_need(disk, now))
        return found

    def _settle(self) -> None:
        needs = self._needs()
        wanted = sum(need.want.bytes for need in needs)
        self.owed = sum(need.owed for need in needs)
        ahead = self.owed + min(wanted, _AHEAD)
        while self._pool.grow(ahead - self._pool.room()):  # a larger one keeps more for itself
            pass
        room, below = self._pool.room(), self._pool.below()
        own = room - self.owed
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
        return _Need(disk, 0, disk.shared, Want(disk.most, Turn.BEGINS))
    used, file = disk.volume.used(), os.stat(disk.image)
    if disk.mark is not None and used > disk.mark + _MIB:
        disk.wrote, disk.mark = now, used
    disk.mark = used if disk.mark is None else min(disk.mark, used)
    there = file.st_blocks * 512
    lacks = max(0, file.st_size - there)
    still = disk.image.parent.with_name(STILL + disk.image.parent.name)
    shared = there if still.exists() else min(there, disk.shared)
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
