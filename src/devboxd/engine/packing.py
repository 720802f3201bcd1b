"""All below a folder as one archive, written to the standard output: `python -m devboxd.engine.packing FOLDER`.

A program of its own, whose memory grows neither with the length of paths nor with what files hold: some 600 bytes for
each open level, twice the names of the folder that is sorted, some 500 bytes for each file of several names, and some
90 for each piece of the file with holes that is read.

Up to paths of `LONGEST_PATH` bytes the archive is what GNU tar writes with `--format=pax --sort=name --sparse
--sparse-version=0.0 --xattrs --numeric-owner`. tar brings nothing longer back, and whole paths would make the archive
grow with the square of the depth: further down an entry has its own name and, in records of its own, how deep it lies.
"""

from __future__ import annotations

import os
import stat
import sys
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
LONGEST_PATH = 4095
"""Bytes of a path, with the `.` that it begins with."""
DEPTH, LINKED, LINK = b"DEVBOXD.depth", b"DEVBOXD.linked", b"DEVBOXD.link"
"""Records of what lies deeper: below how many folders, and the number of a file of several names, at the first of them
and at the others."""
XATTR = b"SCHILY.xattr."
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PIECE = 1 << 20
_RECORD = 20 * BLOCK
_SHORT = 100
_LARGEST_ID, _LARGEST_SIZE = 0o7777777, 0o77777777777
_NODES = {stat.S_IFCHR: b"3", stat.S_IFBLK: b"4", stat.S_IFIFO: b"6"}

_Place = tuple["_Place | None", bytes]
"""A name, after that of the folder in which it lies."""
_Record = tuple[bytes, bytes]


@dataclass(slots=True)
class _Level:
    """A folder on the way down. `path` ends with a slash and is None where it is too long."""

    place: _Place
    path: bytes | None
    identity: tuple[int, int]
    names: bytes
    at: int = 0

    def next(self) -> bytes | None:
        """The next name in it, in the order of bytes; None after the last."""
        if self.at >= len(self.names):
            return None
        begin, self.at = self.at, self.names.index(b"\0", self.at) + 1
        return self.names[begin : self.at - 1]


@dataclass(slots=True)
class _Entry:
    """Something in the folder that is open as `folder`, `depth` folders below the first one."""

    folder: int
    name: bytes
    path: bytes | None
    depth: int
    place: _Place
    status: os.stat_result


class Packer:
    """Writes one archive."""

    def __init__(self, output: BinaryIO) -> None:
        self._output = output
        self._written = 0
        self._seen: dict[int, _Place | int] = {}
        self._linked = 0

    def pack(self, folder: str) -> None:
        """Write all that is below a folder. Raises OSError and MemoryError."""
        here = os.open(folder, FOLDER_FLAGS)
        status = os.fstat(here)
        self._head(b"5", _Entry(here, b".", b".", 0, (None, b"."), status))
        levels = [_Level((None, b"."), b"./", _identity(status), _names(here))]
        while levels:
            name = levels[-1].next()
            if name is not None:
                here = self._enter(here, name, levels)
            elif levels.pop() and levels:
                here = _moved(here, b"..", levels[-1].identity)
        os.close(here)
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self._written % _RECORD))
        self._output.flush()

    def _enter(self, here: int, name: bytes, levels: list[_Level]) -> int:
        """Write one entry; the folder that is open then, which is the entry itself where it is a folder."""
        status = os.stat(name, dir_fd=here, follow_symlinks=False)
        above = levels[-1]
        path = above.path + name if above.path is not None else None
        if path is not None and len(path) + stat.S_ISDIR(status.st_mode) > LONGEST_PATH:
            path = None
        entry = _Entry(here, name, path, len(levels), (above.place, name), status)
        if not stat.S_ISDIR(status.st_mode):
            self._other(entry)
            return here
        self._head(b"5", entry)
        here = _moved(here, name, _identity(status))
        below = path + b"/" if path is not None else None
        levels.append(_Level(entry.place, below, _identity(status), _names(here)))
        return here

    def _other(self, entry: _Entry) -> None:
        status = entry.status
        known = self._seen.get(status.st_dev << 64 | status.st_ino) if status.st_nlink > 1 else None
        if known is not None:
            self._same(entry, known)
        elif stat.S_ISREG(status.st_mode):
            self._file(entry)
        elif stat.S_ISLNK(status.st_mode):
            target = os.readlink(entry.name, dir_fd=entry.folder)
            self._head(b"2", entry, link=target, after=self._keep(entry))
        elif kind := _NODES.get(stat.S_IFMT(status.st_mode)):
            self._head(kind, entry)

    def _same(self, entry: _Entry, known: _Place | int) -> None:
        """One more name of a file."""
        if isinstance(known, int):
            self._head(b"1", entry, after=[(LINK, b"%d" % known)])
        else:
            self._head(b"1", entry, link=_path(known))

    def _keep(self, entry: _Entry) -> Sequence[_Record]:
        """Remember a file that has several names; what its entry says for that."""
        if entry.status.st_nlink == 1:
            return []
        key = entry.status.st_dev << 64 | entry.status.st_ino
        if entry.path is not None:
            self._seen[key] = entry.place
            return []
        self._linked += 1
        self._seen[key] = self._linked
        return [(LINKED, b"%d" % self._linked)]

    def _file(self, entry: _Entry) -> None:
        file = os.open(entry.name, _FILE_FLAGS, dir_fd=entry.folder)
        try:
            if _identity(os.fstat(file)) != _identity(entry.status):
                raise OSError("a file became another one while it was read")
            size = entry.status.st_size
            pieces = _pieces(file, entry.status)
            if pieces is None:
                self._head(b"0", entry, size=size, after=self._keep(entry))
                self._content(file, 0, size)
                return
            total = sum(pieces[1::2])
            self._head(b"0", entry, size=total, before=_sparse(size, pieces), after=self._keep(entry))
            for number in range(0, len(pieces), 2):
                self._content(file, pieces[number], pieces[number + 1])
        finally:
            os.close(file)

    def _content(self, file: int, offset: int, size: int) -> None:
        left = size
        while left:
            piece = os.pread(file, min(left, _PIECE), offset + size - left)
            if not piece:
                raise OSError("a file became shorter while it was read")
            self._write(piece)
            left -= len(piece)
        self._write(bytes(-size % BLOCK))

    def _head(
        self,
        kind: bytes,
        entry: _Entry,
        *,
        size: int = 0,
        link: bytes = b"",
        before: bytes | bytearray = b"",
        after: Sequence[_Record] = (),
    ) -> None:
        """All that is said of an entry before its content: its header, and in one before that what does not fit."""
        status = entry.status
        short = entry.name if entry.path is None else entry.path
        name = short + b"/" if kind == b"5" else short
        mtime = status.st_mtime_ns // 10**9
        target = _record(b"linkpath", link) if len(link) > _SHORT else b""
        rest = b"".join(_record(key, value) for key, value in (*_beyond(kind, entry, name, size), *after))
        if length := len(target) + len(before) + len(rest):
            beside = b"./." if short == b"." else short
            self._write(_header(b"x", beside, 0o644, 0, 0, length, min(max(mtime, 0), _LARGEST_SIZE)))
            for piece in (target, before, rest, bytes(-length % BLOCK)):
                self._write(piece)
        device = (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in b"34" else (0, 0)
        ids = (_fitting(status.st_uid, _LARGEST_ID), _fitting(status.st_gid, _LARGEST_ID))
        numbers = (*ids, _fitting(size, _LARGEST_SIZE), _fitting(mtime, _LARGEST_SIZE))
        self._write(_header(kind, name, stat.S_IMODE(status.st_mode), *numbers, link, device))

    def _write(self, piece: bytes | bytearray) -> None:
        self._output.write(piece)
        self._written += len(piece)


def _names(folder: int) -> bytes:
    """The names in a folder, in the order of bytes, each with a zero after it."""
    names = sorted(os.listdir(b"/proc/self/fd/%d" % folder))
    names.append(b"")
    return b"\0".join(names)


def _moved(here: int, name: bytes, identity: tuple[int, int]) -> int:
    """The folder of a name in one that is open, in its place; it must be this one. Raises OSError."""
    try:
        there = os.open(name, FOLDER_FLAGS, dir_fd=here)
    finally:
        os.close(here)
    if _identity(os.fstat(there)) != identity:
        raise OSError("a folder was moved while it was read")
    return there


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _path(place: _Place) -> bytes:
    names = []
    at: _Place | None = place
    while at is not None:
        at, name = at
        names.append(name)
    return b"/".join(reversed(names))


def _pieces(file: int, status: os.stat_result) -> array[int] | None:
    """Where a file with holes has data, offsets and lengths in turn; None for one without."""
    size = status.st_size
    if status.st_blocks >= -(-size // BLOCK):
        return None
    found = array("Q")
    at = 0
    while status.st_blocks:
        try:
            begin = os.lseek(file, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole is left
            break
        at = os.lseek(file, begin, os.SEEK_HOLE)
        if begin == 0 and at == size:
            return _pieces_by_zeros(file)
        found.extend((begin, at - begin))
    found.extend((size, 0))
    return found


def _pieces_by_zeros(file: int) -> array[int]:
    """The same for a file system that does not tell holes: blocks of zeros are holes."""
    found = array("Q")
    begin = at = length = 0
    while piece := os.pread(file, _PIECE, at):
        for start in range(0, len(piece), BLOCK):
            block = piece[start : start + BLOCK]
            if block.strip(b"\0"):
                begin, length = (begin if length else at + start), length + len(block)
            elif length:
                found.extend((begin, length))
                length = 0
        at += len(piece)
    found.extend((begin, length) if length else (at, 0))
    return found


def _sparse(size: int, pieces: array[int]) -> bytearray:
    said = bytearray(_record(b"GNU.sparse.size", b"%d" % size))
    said += _record(b"GNU.sparse.numblocks", b"%d" % (len(pieces) // 2))
    for number in range(0, len(pieces), 2):
        said += _record(b"GNU.sparse.offset", b"%d" % pieces[number])
        said += _record(b"GNU.sparse.numbytes", b"%d" % pieces[number + 1])
    return said


def _beyond(kind: bytes, entry: _Entry, name: bytes, size: int) -> Iterator[_Record]:
    """What does not fit into the header of an entry."""
    status = entry.status
    if entry.path is None or len(name) > _SHORT or not name.isascii():
        yield b"path", name
    ids = ((b"uid", status.st_uid, _LARGEST_ID), (b"gid", status.st_gid, _LARGEST_ID))
    for key, value, largest in (*ids, (b"size", size, _LARGEST_SIZE)):
        if value > largest:
            yield key, b"%d" % value
    if status.st_mtime_ns % 10**9 or not 0 <= status.st_mtime_ns // 10**9 <= _LARGEST_SIZE:
        yield b"mtime", _time(status.st_mtime_ns)
    if kind != b"1":
        yield from _attributes(entry)
    if entry.path is None:
        yield DEPTH, b"%d" % entry.depth


def _attributes(entry: _Entry) -> Iterator[_Record]:
    path = b"/proc/self/fd/%d/%s" % (entry.folder, entry.name)
    for name in os.listxattr(path, follow_symlinks=False):
        key = os.fsencode(name).replace(b"%", b"%25").replace(b"=", b"%3D")
        yield XATTR + key, os.getxattr(path, name, follow_symlinks=False)


def _time(ns: int) -> bytes:
    seconds, fraction = divmod(abs(ns), 10**9)
    text = b"%s%d" % (b"-" if ns < 0 else b"", seconds)
    return text + b"." + (b"%09d" % fraction).rstrip(b"0") if fraction else text


def _record(key: bytes, value: bytes) -> bytes:
    length = bare = len(key) + len(value) + 3
    while len(b"%d" % length) + bare != length:
        length = len(b"%d" % length) + bare
    return b"%d %s=%s\n" % (length, key, value)


def _fitting(value: int, largest: int) -> int:
    return value if 0 <= value <= largest else 0


def _header(
    kind: bytes,
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    mtime: int,
    link: bytes = b"",
    device: tuple[int, int] | None = None,
) -> bytes:
    devices = b"%07o\0%07o\0" % device if device else bytes(16)
    front = name[:_SHORT].ljust(_SHORT, b"\0") + b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, gid, size, mtime)
    back = kind + link[:_SHORT].ljust(_SHORT, b"\0") + b"ustar\00000" + bytes(64) + devices
    total = sum(front) + sum(back) + 8 * ord(" ")
    return (front + b"%06o\0 " % total + back).ljust(BLOCK, b"\0")


def main(folder: str) -> int:
    """Pack a folder; the exit status, and why not on the standard error output."""
    try:
        with suppress(BrokenPipeError):  # the reader says why
            Packer(sys.stdout.buffer).pack(folder)
            return 0
    except MemoryError:
        print("what it holds needs more memory than this may have", file=sys.stderr)
    except OSError as error:
        print(error, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
