"""A small disk of a test's own, which can be filled to the last byte."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_SHUT_DOWN, _LOG_FLUSHED = 0x8004587D, 1


class Disk:
    """A mounted file system of so many megabytes, of which only what is written takes memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take all the room that there is, down to single blocks, or but so many bytes."""
        with self._filler.open("ab") as filler:
            size = filler.tell()
            if leave:
                free = os.statvfs(self.folder).f_bavail * os.statvfs(self.folder).f_frsize
                os.posix_fallocate(filler.fileno(), size, free - leave)
                return
            for step in (1 << 20, 1 << 12):
                with contextlib.suppress(OSError):
                    while True:
                        os.posix_fallocate(filler.fileno(), size, step)
                        size += step
        assert os.statvfs(self.folder).f_bavail == 0

    def free(self) -> None:
        """Give the room back."""
        self._filler.unlink()

    def end_writing(self) -> None:
        """Let the kernel find an error, upon which it ends all writing, but not reading."""
        subprocess.run(["mount", "-o", "remount,errors=remount-ro", self.folder], check=True)
        device = Path(self._source()).name
        Path("/sys/fs/ext4", device, "trigger_fs_error").write_text("a test")

    def shut_down(self) -> None:
        """Let every read and write of files fail from now on, as when the device is gone."""
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(folder, _SHUT_DOWN, struct.pack("=I", _LOG_FLUSHED))
        finally:
            os.close(folder)

    def mend(self) -> None:
        """Unmount, check and mount it again, as an operator does. What uses it makes that fail."""
        source = self._source()
        with open(source, "rb"):  # the device stays
            subprocess.run(["umount", self.folder], check=True)
            latest = time.monotonic() + 60
            while b"is in use" in (checked := _checked(source)).stdout and time.monotonic() < latest:
                time.sleep(0.05)  # a mount namespace that another program makes holds all mounts for a moment
            assert checked.returncode < 4, checked
            subprocess.run(["mount", source, self.folder], check=True)

    def _source(self) -> str:
        command = ("findmnt", "--noheadings", "--output", "SOURCE", "--mountpoint", self.folder)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@contextlib.contextmanager
def small_disk(megabytes: int, make: tuple[str, ...] = ("mkfs.ext4", "-q", "-m", "0")) -> Iterator[Disk]:
    """Such a disk, in memory; unmounted and removed after the block. `make`: the program that makes its file system."""
    with (
        tempfile.TemporaryDirectory(prefix="devboxd-disk-", dir="/dev/shm") as shared,
        tempfile.TemporaryDirectory(prefix="devboxd-disk-", dir="/var/tmp") as name,
    ):
        image, folder = Path(shared, "image"), Path(name, "disk")
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        subprocess.run([*make, image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
        try:
            yield Disk(folder)
        finally:
            try:
                _unmount(folder)
            except subprocess.CalledProcessError:
                subprocess.run(["umount", "--lazy", folder], check=True)  # the test fails, and leaves the machine clean
                raise


def _unmount(folder: Path) -> None:
    """Once the kernel has let go of the file system in a file on it, of which nothing tells."""
    latest = time.monotonic() + 30
    while subprocess.run(["umount", folder], check=False, stderr=subprocess.DEVNULL).returncode:
        if time.monotonic() > latest:
            subprocess.run(["umount", folder], check=True)
            return
        time.sleep(0.05)


def _checked(source: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["e2fsck", "-fy", source], capture_output=True, check=False)
