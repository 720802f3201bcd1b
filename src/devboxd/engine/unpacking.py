"""Fill a folder with what is in an archive: `python -m devboxd.engine.unpacking ARCHIVE FOLDER`.

A program of its own, for archives of `packing.py` and those that GNU tar wrote for earlier versions. It never names
more than one component of a path to the kernel, so nothing is too long and nothing leads out of the folder.
"""

from __future__ import annotations

import os
import shutil
import sys
from array import array
from dataclasses import dataclass, field
from errno import EMLINK
from pathlib import Path
from typing import BinaryIO

from devboxd.engine.packing import BLOCK, DEPTH, FOLDER_FLAGS, LINK, LINKED, XATTR

_PIECE = 1 << 20
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_NODES = {b"3": 0o020000, b"4": 0o060000, b"6": 0o010000}


class Damaged(Exception):
    """What was read is no archive that a server wrote."""


@dataclass(slots=True)
class _Entry:
    kind: bytes
    path: bytes
    link: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    device: int
    records: dict[bytes, bytes]
    pieces: array[int] = field(default_factory=lambda: array("Q"))
    attributes: list[tuple[bytes, bytes]] = field(default_factory=list)

    def place(self) -> tuple[list[bytes] | int, bytes]:
        """The folders in which it lies, or how many where it lies too deep for a path, and its name."""
        deep = DEPTH in self.records
        first, *names = (b"./" * deep + self.path.removesuffix(b"/")).split(b"/")
        if first != b"." or not names or any(part in (b"", b".", b"..") for part in names):
            raise Damaged(f"it has an entry {os.fsdecode(self.path[:80])!r}")
        return int(self.records[DEPTH]) - 1 if deep else names[:-1], names[-1]


@dataclass(slots=True)
class _Level:
    name: bytes
    entry: _Entry


class Unpacker:
    """Fills one folder."""

    def __init__(self, source: BinaryIO, folder: str) -> None:
        self._source = source
        self._root = os.open(folder, FOLDER_FLAGS)
        self._here = os.dup(self._root)
        self._levels: list[_Level] = []
        self._links = Path(f"{folder}.links")
        """The first name of each file that has more of them where paths are too long to find it again."""

    def unpack(self) -> None:
        """Bring all back. Raises OSError, Damaged and ValueError."""
        try:
            while (entry := _entry(self._source)) is not None:
                if entry.path == b"./":
                    self._levels.append(_Level(b".", entry))
                elif not self._levels:
                    raise Damaged("it does not begin with a folder")
                else:
                    self._bring_back(entry)
            while self._levels:
                self._up()
        finally:
            shutil.rmtree(self._links, ignore_errors=True)

    def _bring_back(self, entry: _Entry) -> None:
        above, name = entry.place()
        depth = above if isinstance(above, int) else len(above)
        if not 0 <= depth < len(self._levels):
            raise Damaged("it has an entry before its folder")
        while len(self._levels) - 1 > depth:
            self._up()
        if not isinstance(above, int) and above != [level.name for level in self._levels[1:]]:
            raise Damaged("it has an entry outside its folder")
        if entry.kind == b"5":
            os.mkdir(name, 0o700, dir_fd=self._here)
            self._move(name)
            self._levels.append(_Level(name, entry))
        elif entry.kind == b"1":
            self._link(entry, name)
        else:
            self._make(entry, name)

    def _up(self) -> None:
        """Leave a folder, in which nothing changes any more."""
        entry = self._levels.pop().entry
        _own(self._here, entry)
        if self._levels:
            self._move(b"..")

    def _move(self, name: bytes) -> None:
        there = os.open(name, FOLDER_FLAGS, dir_fd=self._here)
        os.close(self._here)
        self._here = there

    def _make(self, entry: _Entry, name: bytes) -> None:
        if entry.kind == b"0":
            self._file(entry, name)
        else:
            if entry.kind == b"2":
                os.symlink(entry.link, name, dir_fd=self._here)
            elif entry.kind in _NODES:
                os.mknod(name, _NODES[entry.kind] | 0o600, entry.device, dir_fd=self._here)
            else:
                raise Damaged(f"it has an entry of the kind {entry.kind!r}")
            self._own_by_name(entry, name)
        if LINKED in entry.records:
            self._links.mkdir(mode=0o700, exist_ok=True)
            kept = self._links / str(int(entry.records[LINKED]))
            os.link(name, kept, src_dir_fd=self._here, follow_symlinks=False)

    def _file(self, entry: _Entry, name: bytes) -> None:
        file = os.open(name, _NEW, 0o600, dir_fd=self._here)
        try:
            pieces = entry.pieces or array("Q", (0, entry.size))
            if sum(pieces[1::2]) != entry.size:
                raise Damaged("it has a file whose pieces are not as long as the file")
            for number in range(0, len(pieces), 2):
                self._content(file, pieces[number], pieces[number + 1])
            if b"GNU.sparse.size" in entry.records:
                os.ftruncate(file, int(entry.records[b"GNU.sparse.size"]))
            _read(self._source, -entry.size % BLOCK)
            _own(file, entry)
        finally:
            os.close(file)

    def _content(self, file: int, offset: int, size: int) -> None:
        while size:
            piece = _read(self._source, min(size, _PIECE))
            size -= len(piece)
            while piece:
                done = os.pwrite(file, piece, offset)
                offset, piece = offset + done, piece[done:]

    def _own_by_name(self, entry: _Entry, name: bytes) -> None:
        """Give what cannot be opened its owner, mode, attributes and time."""
        os.chown(name, entry.uid, entry.gid, dir_fd=self._here, follow_symlinks=False)
        if entry.kind != b"2":
            os.chmod(name, entry.mode, dir_fd=self._here)
        path = b"/proc/self/fd/%d/%s" % (self._here, name)
        for key, value in entry.attributes:
            os.setxattr(path, key, value, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=self._here, follow_symlinks=False)

    def _link(self, entry: _Entry, name: bytes) -> None:
        """One more name of a file. Where it has as many as it may, the one that is kept aside becomes the last."""
        if LINK in entry.records:
            kept = self._links / str(int(entry.records[LINK]))
            try:
                os.link(kept, name, dst_dir_fd=self._here, follow_symlinks=False)
            except OSError as error:
                if error.errno != EMLINK:
                    raise
                os.rename(kept, name, dst_dir_fd=self._here)
            return
        *above, last = entry.link.split(b"/")[1:]
        at = os.dup(self._root)
        try:
            for folder in above:
                below = os.open(folder, FOLDER_FLAGS, dir_fd=at)
                os.close(at)
                at = below
            os.link(last, name, src_dir_fd=at, dst_dir_fd=self._here, follow_symlinks=False)
        finally:
            os.close(at)


def _own(opened: int, entry: _Entry) -> None:
    """Give an opened file or folder its owner, mode, attributes and time, in an order in which none undoes another."""
    os.fchown(opened, entry.uid, entry.gid)
    os.fchmod(opened, entry.mode)
    for key, value in entry.attributes:
        os.setxattr(opened, key, value)
    os.utime(opened, ns=(entry.mtime, entry.mtime))


def _entry(source: BinaryIO) -> _Entry | None:
    """The next entry, up to its content; None after the last. Raises Damaged, ValueError and OSError."""
    head = _read(source, BLOCK)
    if not head.strip(b"\0"):
        return None
    said = b""
    if head[156:157] == b"x":
        length = int(head[124:135], 8)
        said = _read(source, length)
        _read(source, -length % BLOCK)
        head = _read(source, BLOCK)
    if head[257:263] != b"ustar\0":
        raise Damaged("it has something between its entries")
    entry = _plain(head)
    _add(entry, said)
    return entry


def _plain(head: bytes) -> _Entry:
    """What a header says without what is said before it."""
    mode, uid, gid = (int(head[at : at + 7], 8) for at in (100, 108, 116))
    size, mtime = (int(head[at : at + 11], 8) for at in (124, 136))
    device = os.makedev(int(head[329:336], 8), int(head[337:344], 8))
    path, link = head[:100].rstrip(b"\0"), head[157:257].rstrip(b"\0")
    return _Entry(head[156:157], path, link, mode, uid, gid, size, mtime * 10**9, device, {})


def _add(entry: _Entry, said: bytes) -> None:
    """Take over what is said of an entry before its header."""
    at = 0
    while at < len(said):
        blank = said.index(b" ", at)
        end = at + int(said[at:blank])
        if not blank < end <= len(said):
            raise Damaged("it says something that is cut")
        key, _, value = said[blank + 1 : end - 1].partition(b"=")
        at = end
        if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
            entry.pieces.append(int(value))
        elif key.startswith(XATTR):
            name = key.removeprefix(XATTR).replace(b"%3D", b"=").replace(b"%25", b"%")
            entry.attributes.append((name, value))
        else:
            entry.records[key] = value
    records = entry.records
    entry.path, entry.link = records.get(b"path", entry.path), records.get(b"linkpath", entry.link)
    entry.uid, entry.gid = int(records.get(b"uid", entry.uid)), int(records.get(b"gid", entry.gid))
    entry.size = int(records.get(b"size", entry.size))
    if b"mtime" in records:
        entry.mtime = _nanoseconds(records[b"mtime"])


def _nanoseconds(text: bytes) -> int:
    whole, _, fraction = text.removeprefix(b"-").partition(b".")
    total = int(whole) * 10**9 + int(fraction.ljust(9, b"0"))
    return -total if text.startswith(b"-") else total


def _read(source: BinaryIO, length: int) -> bytes:
    found = source.read(length)
    if len(found) != length:
        raise Damaged("it is cut")
    return found


def main(archive: str, folder: str) -> int:
    """Unpack an archive into a folder; the exit status, and why not on the standard error output."""
    try:
        with open(archive, "rb", buffering=_PIECE) as source:
            Unpacker(source, folder).unpack()
        return 0
    except MemoryError:
        print("what it holds needs more memory than this may have", file=sys.stderr)
    except (Damaged, ValueError) as error:
        print(f"the archive is damaged: {error}", file=sys.stderr)
    except OSError as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
