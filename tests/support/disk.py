"""A small disk of a test's own, which can be filled to the last byte."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


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
            subprocess.run(["umount", folder], check=True)
