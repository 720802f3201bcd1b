"""Volumes: ext4 in a file, one for each disk and snapshot, so that a disk has an end of its own.

What fills a volume meets ENOSPC, and `df` tells the truth. Nothing else is in its log: what one box writes, syncs or
deletes holds up no other. In it lie `upper` (what the box sees over its image) and `work` (the overlay's own). The file
is as large as the disk, sparse, and overwritten in place, so a block that was written once needs no more room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from devboxd.engine import linux, loops
from devboxd.engine.processes import which

LARGEST = 64 << 30
"""Bytes that the largest disk holds."""
_BLOCK = 4096
_OWN = 4096
"""Blocks that ext4 keeps for itself: what was promised to a write is never refused when it comes to the disk."""
_LAYOUT = (
    *("-q", "-F", "-b", str(_BLOCK), "-I", "256", "-i", "8192", "-m", "0", "-J", "size=16"),
    *("-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0"),
)
_OPTIONS = ("noinit_itable", "no_prefetch_block_bitmaps", "errors=remount-ro")
_GET_FLAGS, _SET_FLAGS, _CLONE, _NO_COPY_ON_WRITE = 0x80086601, 0x40086602, 0x40049409, 0x00800000
_FREEZE, _THAW, _TRIM, _SHUT_DOWN = 0xC0045877, 0xC0045878, 0xC0185879, 0x8004587D
_PIECE = 128 << 10
"""The least that is given back: smaller pieces cost more than they are worth."""
_WITHOUT_WRITING = 2
_SUPERBLOCK, _MAGIC = 1024, 0xEF53


def lack() -> str | None:
    """What this machine lacks for volumes, with what helps."""
    if which("mkfs.ext4") is None:
        return "mkfs.ext4 is missing (package e2fsprogs)"
    if not loops.available() or not linux.has_file_system("ext4"):
        return "the kernel offers no loop devices or no ext4"
    return None


def make(file: Path, size: int) -> Volume:
    """Make an empty volume that holds `size` bytes, and open it. Raises OSError."""
    with _created(file) as descriptor:
        os.truncate(descriptor, _whole(size))
    _run("mkfs.ext4", *_LAYOUT, str(file))
    volume = Volume(file, new=True)
    try:
        (volume.path / "upper").mkdir()
        (volume.path / "upper").chmod(0o755)  # the root of the box, whatever the server's mask
        (volume.path / "work").mkdir(mode=0o700)
    except OSError:
        volume.close()
        raise
    return volume


def copy(source: Path, target: Path) -> None:
    """Make a copy of a volume that nobody has open, which shares all with it. Raises OSError."""
    original = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _created(target) as descriptor:
            fcntl.ioctl(descriptor, _CLONE, original)
    finally:
        os.close(original)


@contextlib.contextmanager
def _created(file: Path) -> Iterator[int]:
    """A new file that is overwritten in place, also where nothing else is."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        flags = bytearray(8)
        fcntl.ioctl(descriptor, _GET_FLAGS, flags)
        fcntl.ioctl(descriptor, _SET_FLAGS, struct.pack("=Q", int.from_bytes(flags, "little") | _NO_COPY_ON_WRITE))
        yield descriptor
    finally:
        os.close(descriptor)


def enlarge(file: Path, size: int) -> None:
    """Make a volume that nobody has open hold `size` bytes, where it holds less. Raises OSError."""
    if (wanted := _whole(size)) > _blocks(_head(file)) * _BLOCK:
        os.truncate(file, max(wanted, os.stat(file).st_size))
        _run("resize2fs", "-f", str(file))


def used(file: Path) -> int:
    """Bytes in use in a volume that nobody has open, or as it was written last. Raises OSError."""
    head = _head(file)
    overhead: int = struct.unpack_from("<I", head, 0x248)[0]
    return max(0, _blocks(head) - _number(head, 0xC, 0x158) - overhead) * _BLOCK


def _whole(size: int) -> int:
    """How large the file must be for so many bytes: a table of names takes a 32nd part, and its log 16 MiB."""
    return (size + size // 30 + (64 << 20)) // _BLOCK * _BLOCK


def _head(file: Path) -> bytes:
    with file.open("rb") as content:
        head = os.pread(content.fileno(), 1024, _SUPERBLOCK)
    if len(head) < 1024 or struct.unpack_from("<H", head, 0x38)[0] != _MAGIC:
        raise OSError(f"cannot read the disk {file}: it is no file system")
    return head


def _blocks(head: bytes) -> int:
    return _number(head, 0x4, 0x150)


def _number(head: bytes, low: int, high: int) -> int:
    return int(struct.unpack_from("<I", head, low)[0] | struct.unpack_from("<I", head, high)[0] << 32)


class Volume:
    """A volume that is open. It is in use until it is closed, and as long as a box stands on it."""

    def __init__(self, file: Path, *, new: bool = False, known: str | None = None, read_only: bool = False) -> None:
        """Open it, see `loops.attached`; `read_only` for one that is not to be changed. Raises OSError."""
        with loops.attached(file, new=new, known=known, read_only=read_only) as device:
            self.device = os.path.basename(device)
            self._options = ("ro",) if read_only else _OPTIONS
            self._mount = linux.file_system("ext4", device, self._options)
        self._source = device
        try:
            self.descriptor = os.open(f"/proc/self/fd/{self._mount}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            os.close(self._mount)
            raise

    @property
    def path(self) -> Path:
        """Where all that is in it can be found, also by programs, while it is open."""
        return Path(f"/proc/{os.getpid()}/fd/{self.descriptor}")

    def tree(self) -> int:
        """A descriptor of another new mount of it. Raises OSError."""
        return linux.file_system("ext4", self._source, self._options)

    def close(self) -> None:
        """Let it go; the last one who does so waits until all is written."""
        os.close(self.descriptor)
        os.close(self._mount)

    def drop(self) -> None:
        """Have nothing of it written any more: it will be deleted. Raises OSError."""
        fcntl.ioctl(self.descriptor, _SHUT_DOWN, struct.pack("=I", _WITHOUT_WRITING))

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Whole and clean in its file for the length of the block; who changes something waits. Raises OSError.

        One that is frozen already was so by somebody who died: others must be kept out by the caller. A copy of the
        file is to be taken in such a block, not after `close`: a process that is just started may be the last user.
        """
        linux.write_back(self.descriptor)
        try:
            fcntl.ioctl(self.descriptor, _FREEZE, 0)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            self.thaw()
            fcntl.ioctl(self.descriptor, _FREEZE, 0)
        try:
            yield
        finally:
            self.thaw()

    def thaw(self) -> None:
        """Let them go on; harmless for one that is not frozen."""
        with contextlib.suppress(OSError):
            fcntl.ioctl(self.descriptor, _THAW, 0)

    def bound(self, size: int | None) -> None:
        """Let it hold so many bytes and no more, or what it can where it is smaller; None: all of it. Raises OSError.

        The rest is refused to everybody by the kernel, as what is not there.
        """
        Path("/sys/fs/ext4", self.device, "reserved_clusters").write_text(str(0 if size is None else self.kept(size)))

    def kept(self, size: int) -> int:
        """How many blocks are to be kept back so that it holds so many bytes. Raises OSError."""
        blocks = os.fstatvfs(self.descriptor).f_blocks
        return min(blocks, max(_OWN, blocks - size // _BLOCK))

    def give_back(self, at_once: bool) -> None:
        """Whether the room of what is deleted leaves the file by itself, soon, or by `trim` alone. Raises OSError."""
        linux.reconfigure(self._mount, "discard" if at_once else "nodiscard")

    def trim(self, start: int, length: int) -> None:
        """Give back what is free in this part of it, in bytes. Raises OSError."""
        descriptor = os.dup(self.descriptor)
        try:
            fcntl.ioctl(descriptor, _TRIM, bytearray(struct.pack("=3Q", start, length, _PIECE)))
        finally:
            os.close(descriptor)

    def used(self) -> int:
        """Bytes in use."""
        found = os.fstatvfs(self.descriptor)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def room(self) -> float:
        """The share of it that can still be written, of blocks or of names, whichever is less."""
        found = os.fstatvfs(self.descriptor)
        in_use = found.f_blocks - found.f_bfree
        return min(found.f_bavail / max(1, found.f_bavail + in_use), found.f_favail / max(1, found.f_files))


@contextlib.contextmanager
def opened(file: Path, *, known: str | None = None, read_only: bool = False) -> Iterator[Volume]:
    """A volume for the length of a block. Raises OSError."""
    volume = Volume(file, known=known, read_only=read_only)
    try:
        yield volume
    finally:
        volume.close()


def _run(program: str, *arguments: str) -> None:
    if (path := which(program)) is None:
        raise OSError(f"cannot find {program}; install e2fsprogs")
    command = (path, *arguments)
    null = subprocess.DEVNULL
    done = subprocess.run(command, stdin=null, capture_output=True, text=True, check=False, close_fds=False)
    if done.returncode:
        raise OSError(f"cannot make the disk {arguments[-1]}: {program} said: {done.stderr.strip()[-500:]}")
