"""The disks of boxes: the writable layer of each, and snapshots of them, side by side in the pool.

    <pool>/dbx_...   upper (what the box sees over its image), work (the overlay's own), slot (of the box), given (files
                     in upper that are the server's, as it wrote them)
    <pool>/snp_...   the same at one instant; nothing writes it

Under its name a disk is whole or not there: it is made under another one, and so are folders removed. What is in
`upper` is the box's and hostile: names in it are never followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from devboxd.engine import btrfs, manifest
from devboxd.engine.base import FULL, EngineError
from devboxd.engine.blocking import finished
from devboxd.engine.pool import Pool
from devboxd.engine.processes import piped

_GIVEN = "given"
_BOX, _SNAPSHOT = "dbx_", "snp_"
_MAKING, _GOING, _STILL, _SPARE = ".new-", ".gone-", ".still-", ".spare-"


class Disks:
    """All disks and snapshots of one server. Every method but `boxes` may take its time: for threads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._folder = pool.folder
        self._held = False
        self._own: tuple[str, ...] = ()
        """The files that a new disk gets."""

    def open(self) -> None:
        """Open the pool and remove what an earlier server was making or removing. Raises SetupError."""
        self._pool.open()
        with contextlib.suppress(BlockingIOError), self._stills():
            self._forget_stills()
        for path in self._folder.iterdir():
            if path.name.startswith((_MAKING, _GOING, _SPARE)):
                self._delete(path)
            elif path.name.startswith(_BOX) and self._pool.copies:
                with contextlib.suppress(OSError):
                    self._pool.promise(path.name, btrfs.limited(path))

    def close(self) -> None:
        """Close the pool."""
        self._pool.close()

    def path(self, name: str) -> Path:
        """Where the disk of a box, or a snapshot, lies."""
        return self._folder / name

    def create(self, box_id: str, slot: int, files: Mapping[str, str], snapshot_id: str | None) -> Path:
        """A new disk for the box, empty or from a snapshot, with these files (paths below its root) of the box's root.

        Where copying takes its time, `fetch` comes before. Raises EngineError when there is no such snapshot, and
        OSError; `remove` takes away what was begun then.
        """
        making = self._making(box_id)
        if snapshot_id is None:
            self._delete(making)
            self._make(making)
            (making / "upper").mkdir()
            (making / "upper").chmod(0o755)
        elif self._pool.copies:
            self._delete(making)
            try:
                self._spare(snapshot_id).rename(making)
            except FileNotFoundError:
                self._branch(snapshot_id, making)
        (making / "work").mkdir(exist_ok=True)
        _write_own(making, slot, files)
        self._own = tuple(files)
        making.rename(self._folder / box_id)
        return self._folder / box_id

    def refresh(self, box_id: str, files: Mapping[str, str]) -> None:
        """Write files of a disk that was kept anew, but for those that are not as the server wrote them.

        Raises EngineError and OSError.
        """
        disk = self._folder / box_id
        before = self.given(box_id)
        changed = {name: text for name, text in files.items() if text != before.get(name, text)}
        mine = {name: text for name, text in changed.items() if _holds(disk / "upper", name, before[name])}
        if mine:
            _give(disk, mine, before)

    async def fetch(self, box_id: str, snapshot_id: str) -> None:
        """Copy a snapshot for the disk of a box, where that takes its time. Raises as `create`."""
        if not self._pool.copies:
            await self._copy(self._source(snapshot_id), self._making(box_id))

    def spare(self, snapshot_id: str) -> None:
        """Have a copy of a snapshot ready for the next box, where the pool copies: it costs nothing but its making.

        Raises OSError.
        """
        source, spare = self._folder / snapshot_id, self._spare(snapshot_id)
        if not self._pool.copies or spare.exists() or not source.exists():
            return
        making = self._making(snapshot_id)
        self._delete(making)
        self._branch(snapshot_id, making)
        _write_own(making, 0, dict.fromkeys(self._own, ""))  # what is shared no more is quick to write
        making.rename(spare)
        if not source.exists():
            btrfs.delete(spare)

    def forget_spare(self, snapshot_id: str) -> None:
        """Delete the copy that was ready. Raises OSError."""
        if self._pool.copies:
            btrfs.delete(self._spare(snapshot_id))

    def _spare(self, snapshot_id: str) -> Path:
        return self._folder / (_SPARE + snapshot_id)

    def lift(self, box_id: str, most_bytes: int) -> None:
        """Before it is mounted: have room for all that the disk may hold, and no bound, until `limit`. Raises OSError.

        An overlay that cannot make its working folder stays read-only, however full the disk is, or held.
        """
        if self._pool.copies:
            self._pool.promise(box_id, most_bytes)
            btrfs.unlimit(self._folder / box_id)

    def limit(self, box_id: str, most_bytes: int) -> None:
        """Bound what the disk holds, as far as the pool can, with room for all of it. Raises OSError."""
        if self._pool.copies:
            self._pool.promise(box_id, most_bytes)
            btrfs.limit(self._folder / box_id, most_bytes)
            if self._held:
                btrfs.hold(self._folder / box_id, True)

    def hold(self, held: bool) -> None:
        """Let no box write to its disk any more, as far as the pool can, or let all of them again. Raises OSError."""
        self._held = held
        for box_id in self.boxes() if self._pool.copies else ():
            with contextlib.suppress(FileNotFoundError):  # it has just gone
                btrfs.hold(self._folder / box_id, held)

    def used(self, name: str) -> int | None:
        """Bytes of a disk or snapshot, over its image; None where the pool does not count."""
        if not self._pool.copies:
            return None
        with contextlib.suppress(OSError):
            return btrfs.referenced(self._folder / name)
        return None

    async def size(self, name: str) -> int:
        """Bytes of a snapshot, over its image, however long counting takes. Raises EngineError and OSError."""
        disk = self._folder / name
        if self._pool.copies:
            return await finished(partial(btrfs.referenced, disk))
        command = ("du", "--summarize", "--block-size=1", "--", str(disk / "upper"))
        return int((await piped(command, what=f"measure {disk}")).split()[0])

    def full(self, box_id: str) -> bool:
        """Whether a disk has no room left; waits until what was written is counted. Raises OSError."""
        if not self._pool.copies:
            return False
        disk = self._folder / box_id
        btrfs.settle(disk)
        return btrfs.referenced(disk) >= FULL * btrfs.limited(disk) > 0

    def snapshot(self, box_id: str, snapshot_id: str) -> None:
        """Keep the disk as it is now, in a pool that copies. Raises OSError."""
        btrfs.snapshot(self._folder / box_id, self._folder / snapshot_id, read_only=True)

    async def copy(self, box_id: str, snapshot_id: str) -> None:
        """Keep the disk of a box that stands still, in plain folders; it takes its time. Raises EngineError."""
        making = self._making(snapshot_id)
        await self._copy(self._folder / box_id, making)
        making.rename(self._folder / snapshot_id)

    @contextlib.contextmanager
    def still(self, box_ids: Iterable[str]) -> Iterator[dict[str, Path]]:
        """Disks as they are at this instant, whatever their boxes do, until the block ends. For a pool that copies.

        Those that are gone are left out. Raises BlockingIOError where somebody else is in such a block, and OSError.
        """
        found = {}
        with self._stills():
            try:
                self._forget_stills()
                for box_id in box_ids:
                    with contextlib.suppress(FileNotFoundError):
                        btrfs.snapshot(self._folder / box_id, self._folder / (_STILL + box_id), read_only=True)
                        found[box_id] = self._folder / (_STILL + box_id)
                yield found
            finally:
                self._forget_stills()

    @contextlib.contextmanager
    def _stills(self) -> Iterator[None]:
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        finally:
            os.close(folder)

    def _forget_stills(self) -> None:
        for path in self._folder.glob(_STILL + "*"):
            btrfs.delete(path)

    async def restore(self, name: str, archive: Path, size: int, slot: int | None, given: Mapping[str, str]) -> None:
        """Make the disk of a box, or a snapshot, out of an archive of what is in it. Raises EngineError and OSError."""
        making = self._making(name)
        self._delete(making)
        self._pool.promise(name, size)
        try:
            self._make(making)
            (making / "upper").mkdir()
            (making / "work").mkdir()
            if slot is not None:
                (making / "slot").write_text(f"{slot}\n")
            (making / _GIVEN).write_text(json.dumps(given))
            await manifest.extract(archive, making / "upper")
            if self._pool.copies and name.startswith(_SNAPSHOT):
                btrfs.snapshot(making, self._folder / name, read_only=True)
            else:
                making.rename(self._folder / name)
        finally:
            self._delete(making)

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
        self._pool.promise(name, 0)
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

    def _make(self, path: Path) -> None:
        if self._pool.copies:
            btrfs.create(path)
        else:
            path.mkdir(mode=0o700)

    def _making(self, name: str) -> Path:
        return self._folder / (_MAKING + name)

    def _source(self, snapshot_id: str) -> Path:
        source = self._folder / snapshot_id
        if not source.exists():
            raise EngineError(f"cannot find the snapshot {snapshot_id} on the disk; was it deleted?")
        return source

    def _branch(self, snapshot_id: str, target: Path) -> None:
        """A copy that can be written, without the bounds that the disk had of which the snapshot was taken."""
        btrfs.snapshot(self._source(snapshot_id), target, read_only=False)
        btrfs.unlimit(target)

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


def _remove_tree(path: Path) -> None:
    command = ("rm", "-rf", "--one-file-system", "--", path)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"cannot delete {path}: {_last_line(done.stderr)}; look at the disk's health")


def _write_own(disk: Path, slot: int, files: Mapping[str, str]) -> None:
    """What differs from box to box."""
    _put(disk, "slot", f"{slot}\n")
    _give(disk, files)


def _give(disk: Path, files: Mapping[str, str], before: Mapping[str, str] | None = None) -> None:
    """Write files of the server's into the root of a box, and down that it did."""
    for name, text in files.items():
        _put(disk / "upper", name, text)
    _put(disk, _GIVEN, json.dumps({**(before or {}), **files}))


def _put(root: Path, name: str, text: str) -> None:
    """Write a file below `root`, in the place of whatever has its name there.

    Folders that are missing are made. Where the box has put something else in the place of a folder, nothing happens.
    """
    with contextlib.ExitStack() as opened:
        at, last = _folder_of(opened, root, name)
        if at is None:
            return
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(f"/proc/self/fd/{at}/{last}") and not os.path.islink(f"/proc/self/fd/{at}/{last}"):
                _remove_tree(Path(f"/proc/{os.getpid()}/fd/{at}/{last}"))
            else:
                os.unlink(last, dir_fd=at)
        made = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(last, made, 0o644, dir_fd=at)
        try:
            os.fchmod(file, 0o644)
            os.write(file, text.encode())
        finally:
            os.close(file)


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
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder, 0o755, dir_fd=at)
        try:
            at = os.open(folder, flags, dir_fd=at)
        except OSError:
            return None, last
        opened.callback(os.close, at)
    return at, last


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason was given"])[-1]
