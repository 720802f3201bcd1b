"""The disks of boxes: the writable layer of each, and snapshots of them, side by side in the pool.

    <pool>/dbx_...   image (the volume), slot (of the box), given (files in `upper` that are the server's, as it wrote
                     them); plain folders have no volume, and `upper` and `work` beside the others
    <pool>/snp_...   the same at one instant; nothing writes it
    <pool>/.empty-N  a disk of N bytes in which nothing is; beside it copies of it, which wait for boxes

Under its name a disk is whole or not there: it is made under another one, and so are folders removed. What is in
`upper` is the box's and hostile: names in it are never followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import secrets
import stat
import subprocess
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import structlog

from devboxd.concurrency.threads import finished
from devboxd.engine import btrfs, linux, loops, manifest, volumes
from devboxd.engine.base import EngineError
from devboxd.engine.credits import STILL, Credits
from devboxd.engine.pool import Pool
from devboxd.engine.processes import BOUNDED, piped
from devboxd.engine.volumes import Volume
from devboxd.errors import SetupError

_log = structlog.get_logger(__name__)
_GIVEN, _IMAGE = "given", "image"
_BOX, _SNAPSHOT = "dbx_", "snp_"
_STOCK = 16
_SOON_DELETED = 2048
"""Blocks, of 512 bytes, of a file that is deleted at once."""
_GARBAGE = 96 << 20
_MAKING, _GOING, _SPARE, _EMPTY = ".new-", ".gone-", ".spare-", ".empty-"


class Disks:
    """All disks and snapshots of one server. Every method but `boxes` may take its time: for threads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._folder = pool.folder
        self.credits = Credits(pool)
        self._open: dict[str, Volume] = {}
        """The volumes of living boxes, as far as this process has to do with them."""
        self._devices: dict[str, str] = {}
        """Which devices there were when this server began, by the folder and name of their files."""
        self._empty: dict[int, list[Path]] = {}
        """Disks that wait for a box, by their size."""
        self._numbers = itertools.count()
        self._emptying = threading.Lock()

    def open(self) -> None:
        """Open the pool and remove what an earlier server was making or removing. Raises SetupError."""
        self._pool.open()
        with contextlib.suppress(BlockingIOError), self._stills():
            self._forget_stills()
        for upper in self._folder.glob("*/upper") if btrfs.holds(self._folder) else ():
            if btrfs.is_subvolume(upper.parent):
                raise SetupError(
                    f"cannot use the disks in {self._folder}: an earlier version of devboxd wrote {upper.parent.name}; "
                    "make a backup by that version, and restore it with this one"
                )
        self._devices = {file: name for name, file in loops.devices()}
        for path in self._folder.iterdir() if self._pool.copies else ():
            self._thaw_left(path)
        for path in self._folder.iterdir():
            if path.name.startswith((_MAKING, _GOING, _SPARE, _EMPTY)):
                self._delete(path)

    def _thaw_left(self, path: Path) -> None:
        """What a server died over while it was frozen stays so, and in use, until somebody says otherwise."""
        if known := self._devices.get(f"{path.name}/{_IMAGE}"):
            with contextlib.suppress(OSError), volumes.opened(path / _IMAGE, known=known) as volume:
                volume.thaw()

    def close(self) -> None:
        """Close the pool."""
        if self._pool.copies:
            with contextlib.suppress(OSError):
                self.credits.close()
        while self._open:
            self._open.popitem()[1].close()
        self._pool.close()

    def path(self, name: str) -> Path:
        """Where the disk of a box, or a snapshot, lies."""
        return self._folder / name

    def adopt(self, box_id: str, most_bytes: int) -> None:
        """Take over the disk of a box that outlived its server, which may hold so much. Raises OSError."""
        if self._pool.copies:
            self._volume_of(box_id).thaw()
            self.limit(box_id, most_bytes)

    def create(self, box_id: str, slot: int, files: Mapping[str, str], most_bytes: int, source: str | None) -> None:
        """A new disk of this size for the box, empty or from a snapshot, with these files of the box's root.

        Where copying takes its time, `fetch` comes before. Raises EngineError when there is no such snapshot, or no
        room to write over what is in it, and OSError; `remove` takes away what was begun then.
        """
        making = self._making(box_id)
        if self._pool.copies:
            self.credits.expect(box_id, most_bytes)
            self._delete(making)
            if source is None:
                self._take_empty(most_bytes, making)
            else:
                try:
                    self._spare(source).rename(making)
                except FileNotFoundError:
                    btrfs.snapshot(self._source(source), making, read_only=False)
                volumes.enlarge(making / _IMAGE, most_bytes)
                self.credits.share(box_id, _blocks(making / _IMAGE))
            self._open[box_id] = Volume(making / _IMAGE, new=True)
            if source is not None:
                self._open[box_id].bound(None)  # a full one takes the server's files too
            _give(self._open[box_id].path / "upper", making, files)
        else:
            if source is None:
                self._delete(making)
                making.mkdir(mode=0o700)
                (making / "upper").mkdir()
                (making / "upper").chmod(0o755)
            (making / "work").mkdir(exist_ok=True)
            _give(making / "upper", making, files)
        _put(making, "slot", f"{slot}\n")
        making.rename(self._folder / box_id)

    def _take_empty(self, size: int, target: Path) -> None:
        """Make `target` a disk of this size in which nothing is. Raises OSError."""
        with self._emptying:
            if not self._empty.get(size):
                self._stock(size)
            self._empty[size].pop().rename(target)

    def stock(self, size: int) -> None:
        """Have empty disks of this size ready, where the pool copies. Raises OSError."""
        with self._emptying:
            if self._pool.copies and len(self._empty.get(size, ())) < _STOCK // 2:
                self._stock(size)

    def _stock(self, size: int) -> None:
        """Many at once: the first one that is attached makes the pool write all of them, which takes a while."""
        first = self._folder / f"{_EMPTY}{size}"
        if not first.exists():
            making = self._making(first.name)
            self._delete(making)
            btrfs.create(making)
            volume = volumes.make(making / _IMAGE, size)
            try:
                with volume.frozen():
                    btrfs.snapshot(making, first, read_only=False)
            finally:
                volume.close()
            self._delete(making)
        for _ in range(_STOCK):
            one = self._folder / f"{_EMPTY}{size}-{next(self._numbers)}"
            btrfs.create(one)
            try:
                volumes.copy(first / _IMAGE, one / _IMAGE)
            except OSError:
                btrfs.delete(one)
                raise
            self._empty.setdefault(size, []).append(one)

    def refresh(self, box_id: str, files: Mapping[str, str]) -> None:
        """Write files of a disk that was kept anew, but for those that are not as the server wrote them.

        Raises EngineError and OSError.
        """
        before = self.given(box_id)
        changed = {name: text for name, text in files.items() if text != before.get(name, text)}
        upper = self._upper(box_id)
        mine = {name: text for name, text in changed.items() if _holds(upper, name, before[name])}
        if mine:
            _give(upper, self._folder / box_id, mine, before)

    async def fetch(self, box_id: str, snapshot_id: str) -> None:
        """Copy a snapshot for the disk of a box, where that takes its time. Raises as `create`."""
        if not self._pool.copies:
            await self._copy(self._source(snapshot_id), self._making(box_id))

    def spare(self, name: str) -> None:
        """Have a copy of a snapshot ready for the next box, where the pool copies. Raises OSError."""
        source, spare = self._folder / name, self._spare(name)
        if not self._pool.copies or spare.exists() or not source.exists():
            return
        btrfs.snapshot(source, spare, read_only=False)
        if not source.exists():
            btrfs.delete(spare)

    def forget_spare(self, name: str) -> None:
        """Delete the copy that was ready. Raises OSError."""
        if self._pool.copies:
            btrfs.delete(self._spare(name))

    def _spare(self, name: str) -> Path:
        return self._folder / (_SPARE + name)

    @contextlib.contextmanager
    def tree(self, box_id: str) -> Iterator[int]:
        """A descriptor of a new mount of the disk for its box. Raises OSError."""
        disk = self._folder / box_id
        tree = self._volume_of(box_id).tree() if self._pool.copies else linux.clone(disk)
        try:
            yield tree
        finally:
            os.close(tree)

    def lift(self, box_id: str, most_bytes: int) -> None:
        """Before it is mounted: have room for all that the disk may hold, and no bound, until `limit`.

        Raises EngineError when the pool has no room to write over what it shares with a snapshot, and OSError.
        An overlay that cannot make its working folder stays read-only, however full the disk is, or held.
        """
        if self._pool.copies:
            self.credits.expect(box_id, most_bytes)
            if box_id not in self._open:
                self.credits.share(box_id, btrfs.shared(self._folder / box_id / _IMAGE))
            self._volume_of(box_id).bound(None)

    def limit(self, box_id: str, most_bytes: int) -> None:
        """Bound what the disk holds, as far as the pool can, with room for all of it. Raises OSError."""
        if self._pool.copies:
            self.credits.bound(box_id, self._volume_of(box_id), self._folder / box_id / _IMAGE, most_bytes)

    def garbage(self) -> list[tuple[str, int]]:
        """Open disks on which deleted files still take much room of the pool, and the bytes that each can hold."""
        found = []
        for box_id, volume in tuple(self._open.items()) if self._pool.copies else ():
            with contextlib.suppress(OSError):
                file = os.stat(self._folder / box_id / _IMAGE)
                if file.st_blocks * 512 - volume.used() > _GARBAGE:
                    found.append((box_id, file.st_size))
        return found

    def trim(self, box_id: str, start: int, length: int) -> None:
        """Give back to the pool what is free in a part of an open disk."""
        with contextlib.suppress(OSError, KeyError):
            self._open[box_id].trim(start, length)

    def leave(self, box_id: str) -> subprocess.Popen[bytes] | None:
        """Let go of the disk of a box that has ended, by a process: who does so last waits until all is written.

        Where there can be no process, that is this one.
        """
        self.credits.forget(box_id)
        if (volume := self._open.pop(box_id, None)) is None:
            return None
        try:
            command = ("setpriv", "--pdeathsig=KILL", "sync", "--file-system", "/proc/self/fd/0")
            null = subprocess.DEVNULL
            return subprocess.Popen(command, stdin=volume.descriptor, stdout=null, stderr=null, close_fds=False)
        except OSError as error:
            _log.warning("no program can write a disk back; the server does", box=box_id, error=str(error))
            return None
        finally:
            volume.close()

    def used(self, name: str) -> int | None:
        """Bytes of a disk or snapshot, over its image; None where the pool does not count."""
        if not self._pool.copies:
            return None
        with contextlib.suppress(OSError):
            volume = self._open.get(name)
            return volume.used() if volume else volumes.used(self._folder / name / _IMAGE)
        return None

    async def size(self, name: str) -> int:
        """Bytes of a snapshot, over its image, however long counting takes. Raises EngineError and OSError."""
        disk = self._folder / name
        if self._pool.copies:
            return await finished(partial(volumes.used, disk / _IMAGE))
        command = ("du", "--summarize", "--block-size=1", "--", str(disk / "upper"))
        return int((await piped(command, what=f"measure {disk}")).split()[0])

    def room(self, box_id: str) -> float | None:
        """The share of the disk of a living box that can still be written; None where there is no bound."""
        volume = self._open.get(box_id)
        with contextlib.suppress(OSError):
            return volume.room() if volume else None
        return None

    def snapshot(self, box_id: str, snapshot_id: str) -> None:
        """Keep the disk as it is now, in a pool that copies. Raises EngineError when it is too full, and OSError."""
        with self._at_rest(box_id), self.credits.sharing(box_id):
            btrfs.snapshot(self._folder / box_id, self._folder / snapshot_id, read_only=True)

    def lack(self, name: str) -> str | None:
        """Why there is no room to keep an open disk, to open one at rest, or begin from a snapshot. Raises OSError."""
        if not self._pool.copies:
            return None
        image = self._folder / name / _IMAGE
        rests = name.startswith(_BOX) and name not in self._open
        return self.credits.lack(name, btrfs.shared(image) if rests else _blocks(image))

    async def copy(self, box_id: str, snapshot_id: str) -> None:
        """Keep the disk of a box that stands still, in plain folders; it takes its time. Raises EngineError."""
        making = self._making(snapshot_id)
        await self._copy(self._folder / box_id, making)
        making.rename(self._folder / snapshot_id)

    @contextlib.asynccontextmanager
    async def reading(self, name: str) -> AsyncIterator[Path]:
        """Where all that a box sees over its image can be read, of a snapshot or a disk at rest. Raises OSError."""
        if not self._pool.copies:
            yield self._folder / name / "upper"
            return
        volume = await finished(lambda: Volume(self._folder / name / _IMAGE, read_only=True))
        try:
            yield volume.path / "upper"
        finally:
            await finished(volume.close)

    @contextlib.contextmanager
    def still(self, box_ids: Iterable[str]) -> Iterator[dict[str, str]]:
        """The names of disks as they are at this instant, by box, whatever their boxes do, until the block ends.

        For a pool that copies. Those that are gone are left out. Raises BlockingIOError where somebody else is in such
        a block, SetupError when the pool has no room to write over all of them, and OSError.
        """
        found = {}
        with self._stills():
            try:
                self._forget_stills()
                wanted = list(box_ids)
                self.credits.check_copies(self._folder / box_id / _IMAGE for box_id in wanted)
                for box_id in wanted:
                    with contextlib.suppress(FileNotFoundError):
                        self._copy_of(box_id, self._folder / (STILL + box_id))
                        found[box_id] = STILL + box_id
                yield found
            finally:
                self._forget_stills()

    def _copy_of(self, box_id: str, target: Path) -> None:
        """As it is now. Unlike a snapshot it leaves nothing to be copied on writing once it is gone."""
        btrfs.create(target)
        with self._at_rest(box_id):
            volumes.copy(self._folder / box_id / _IMAGE, target / _IMAGE)

    @contextlib.contextmanager
    def _stills(self) -> Iterator[None]:
        with _locked(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
            yield

    def _forget_stills(self) -> None:
        for path in self._folder.glob(STILL + "*"):
            btrfs.delete(path)

    async def restore(self, name: str, archive: Path, size: int, slot: int | None, given: Mapping[str, str]) -> None:
        """Make the disk of a box, or a snapshot, out of an archive of what is in it. Raises EngineError and OSError."""
        making = self._making(name)
        self._delete(making)
        self.credits.expect(name, size)
        try:
            async with self._filling(making, name) as folder:
                if slot is not None:
                    (making / "slot").write_text(f"{slot}\n")
                (making / _GIVEN).write_text(json.dumps(given))
                await manifest.extract(archive, folder / "upper")
        finally:
            self.credits.forget(name)
            self._delete(making)

    @contextlib.asynccontextmanager
    async def _filling(self, making: Path, name: str) -> AsyncIterator[Path]:
        """A new disk for as much as any can hold, which has its name after the block; the folder of `upper` in it."""
        if not self._pool.copies:
            for folder in (making, making / "upper", making / "work"):
                folder.mkdir(mode=0o700)
            yield making
            os.rename(making, self._folder / name)
            return
        await finished(partial(self._take_empty, volumes.LARGEST, making))
        volume = await finished(lambda: Volume(making / _IMAGE, new=True))
        try:
            yield volume.path
            await finished(partial(self._keep, volume, making, name))
        finally:
            await finished(volume.close)

    def _keep(self, volume: Volume, making: Path, name: str) -> None:
        with volume.frozen():
            if name.startswith(_SNAPSHOT):
                btrfs.snapshot(making, self._folder / name, read_only=True)
            else:
                making.rename(self._folder / name)  # a snapshot would be copied as it is written over

    def given(self, box_id: str) -> dict[str, str]:
        """The files that the server wrote last into the box of a disk; none where an older server made it."""
        try:
            return dict(json.loads((self._folder / box_id / _GIVEN).read_text()))
        except (OSError, ValueError):
            return {}

    def slot(self, box_id: str) -> int | None:
        """The slot that the box of a disk had."""
        try:
            return int((self._folder / box_id / "slot").read_text())
        except (OSError, ValueError):
            return None

    def boxes(self) -> set[str]:
        """The boxes that have a disk."""
        return {path.name for path in self._folder.iterdir() if path.name.startswith(_BOX)}

    def snapshots(self) -> set[str]:
        """The snapshots that are whole."""
        return {path.name for path in self._folder.iterdir() if path.name.startswith(_SNAPSHOT)}

    def remove(self, name: str) -> None:
        """Delete a disk, also one that is half made, or a snapshot; none is no error. Raises EngineError and OSError.

        A subvolume goes at once and whole, so it needs no other name: a pool without room refuses to rename.
        """
        self.credits.forget(name)
        if (volume := self._open.pop(name, None)) is not None:
            with contextlib.suppress(OSError):  # what is broken writes nothing anyway
                volume.drop()
            volume.close()
        if name.startswith(_BOX):
            self._delete(self._making(name))
        if self._pool.copies and btrfs.is_subvolume(self._folder / name):
            btrfs.delete(self._folder / name)
            self.forget_spare(name)
            return
        going = self._folder / (_GOING + name)
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name).rename(going)
        self._delete(going)

    def _volume_of(self, box_id: str) -> Volume:
        """The volume of a box that lives or is to live, which stays open."""
        if box_id not in self._open:
            with _locked(self._folder / box_id):
                known = self._devices.pop(f"{box_id}/{_IMAGE}", None)
                self._open[box_id] = Volume(self._folder / box_id / _IMAGE, known=known)
        return self._open[box_id]

    @contextlib.contextmanager
    def _at_rest(self, box_id: str) -> Iterator[None]:
        """The disk of a box on which nothing changes, and all is written, for the length of the block."""
        disk = self._folder / box_id
        with contextlib.ExitStack() as opened:
            volume = self._open.get(box_id)
            opened.enter_context(_locked(disk))
            opened.enter_context((volume or opened.enter_context(volumes.opened(disk / _IMAGE))).frozen())
            yield

    def _upper(self, box_id: str) -> Path:
        return (self._volume_of(box_id).path if self._pool.copies else self._folder / box_id) / "upper"

    def _making(self, name: str) -> Path:
        return self._folder / (_MAKING + name)

    def _source(self, name: str) -> Path:
        source = self._folder / name
        if not source.exists():
            raise EngineError(f"cannot find the snapshot {name} on the disk; was it deleted?")
        return source

    async def _copy(self, source: Path, target: Path) -> None:
        """File by file, by a process that ends with the caller, and with the server."""
        await finished(partial(self._delete, target))
        command = ("setpriv", "--pdeathsig=KILL", "cp", "--archive", "--reflink=auto", "--sparse=auto", "--")
        try:
            await piped((*command, str(source), str(target)), what=f"copy the disk {source}")
        except EngineError:
            await finished(partial(self._delete, target))
            raise

    def _delete(self, path: Path) -> None:
        """However deep a box has nested its folders."""
        if not path.exists():
            return
        if self._pool.copies and btrfs.is_subvolume(path):
            btrfs.delete(path)
            return
        _remove_tree(path)


@contextlib.contextmanager
def _locked(folder: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Alone with a folder, among all threads and programs of devboxd, for the length of the block."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def _blocks(image: Path) -> int:
    """Bytes that a disk takes of the pool, or shares with others. Raises OSError."""
    return os.stat(image).st_blocks * 512


def _remove_tree(path: Path) -> None:
    command = (*BOUNDED, "rm", "-rf", "--one-file-system", "--", path)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"cannot delete {path}: {_last_line(done.stderr)}; look at the disk's health")


def _give(upper: Path, disk: Path, files: Mapping[str, str], before: Mapping[str, str] | None = None) -> None:
    """Write files of the server's into the root of a box, and down beside it that it did."""
    for name, text in files.items():
        _put(upper, name, text)
    _put(disk, _GIVEN, json.dumps({**(before or {}), **files}))


def _put(root: Path, name: str, text: str) -> None:
    """Write a file below `root`, in the place of whatever has its name there.

    Folders that are missing are made. Where the box has put something else in the place of a folder, nothing happens.
    """
    with contextlib.ExitStack() as opened:
        at, last = _folder_of(opened, root, name)
        if at is None:
            return
        _clear_the_way(at, last)
        made = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(last, made, 0o644, dir_fd=at)
        try:
            os.fchmod(file, 0o644)
            os.write(file, text.encode())
        finally:
            os.close(file)


def _clear_the_way(folder: int, name: str) -> None:
    """Make sure that nothing has a name in a folder: what takes long to delete gets another name there.

    It is the box's, which may delete it: a folder of a million names, or the extents of a large file.
    """
    with contextlib.suppress(FileNotFoundError):
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode) or found.st_blocks > _SOON_DELETED:
            os.rename(name, f"{name}.{secrets.token_hex(8)}", src_dir_fd=folder, dst_dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def _holds(root: Path, name: str, text: str) -> bool:
    """Whether a plain file below `root` has just this text."""
    content = text.encode()
    with contextlib.ExitStack() as opened:
        at, last = _folder_of(opened, root, name)
        if at is None:
            return False
        try:
            file = os.open(last, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
        except OSError:
            return False
        opened.callback(os.close, file)
        return stat.S_ISREG(os.fstat(file).st_mode) and os.read(file, len(content) + 1) == content


def _folder_of(opened: contextlib.ExitStack, root: Path, name: str) -> tuple[int | None, str]:
    """The opened folder in which a path below `root` ends, and the last name; folders that are missing are made.

    None where the box has put something else in the place of a folder.
    """
    *folders, last = name.split("/")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open(root, flags)
    opened.callback(os.close, at)
    for folder in folders:
        made = False
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, dir_fd=at)
            made = True
        try:
            at = os.open(folder, flags, dir_fd=at)
        except OSError:
            return None, last
        opened.callback(os.close, at)
        if made:
            os.fchmod(at, 0o755)  # whatever the server's mask
    return at, last


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given"])[-1]
