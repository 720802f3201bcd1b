"""Root file systems: read-only image layers below, one writable layer per box above, joined by overlayfs.

Both are shown to the overlay through idmapped mounts, so that ids on disk start at 0 whatever range a box has, and
images are never copied or chowned. All mounts are made in a mount namespace of the starting thread and go with it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from devboxd.engine import linux
from devboxd.engine.base import EngineError

_SHIELD = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC


class Disks:
    """The writable layers, a plain folder each: `<folder>/<box>/upper` and the overlay's `work`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self) -> None:
        """Make the folder, where setuid files, devices and programs of boxes mean nothing to the host."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        if str(self.folder) not in linux.mount_points():
            linux.mount(str(self.folder), self.folder, None, linux.MS_BIND)
        linux.mount("none", self.folder, None, linux.MS_BIND | linux.MS_REMOUNT | _SHIELD)

    def close(self) -> None:
        """Take the mount away again; the folder stays closed to all but root."""
        with contextlib.suppress(OSError):
            linux.unmount(self.folder)

    def create(self, box_id: str, files: Mapping[str, str]) -> Path:
        """A new disk with some first files (paths relative to the box's root), owned by the box's root."""
        disk = self.folder / box_id
        (disk / "work").mkdir(parents=True)
        for name, text in files.items():
            path = disk / "upper" / name
            path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o644)
        (disk / "upper").mkdir(exist_ok=True)
        (disk / "upper").chmod(0o755)
        return disk

    def boxes(self) -> set[str]:
        """The boxes that have a disk."""
        return {path.name for path in self.folder.iterdir()}

    def remove(self, box_id: str) -> None:
        """Delete a disk, however deep a box has nested its folders; none is no error. Raises EngineError."""
        disk = self.folder / box_id
        if not disk.exists():
            return
        command = ("rm", "-rf", "--one-file-system", "--", str(disk))
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        if done.returncode:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise EngineError(f"cannot delete the disk {disk}: {' '.join(reason)}; look at the disk's health")


def assemble(place: Path, layers: Iterable[Path], disk: Path, user_namespace: int, uid: int) -> Path:
    """Mount a box's root at `place`/root and return that path; `uid` is the box's root on the host.

    Only for a thread with mounts of its own: it changes that thread's working directory. Raises OSError.
    """
    linux.mount("tmpfs", place, "tmpfs", linux.MS_NODEV, "mode=755,size=1m")
    lower = []
    for number, layer in enumerate(layers):
        lower.append(f"l{number}")
        _attach(layer, place / lower[-1], user_namespace)
    _attach(disk, place / "disk", user_namespace)
    (place / "root").mkdir()
    os.chdir(place)  # one page holds all mount options: names must be short, so relative
    with linux.file_system_ids(uid):  # root of the host has no id on the idmapped disk, and the overlay writes there
        options = f"lowerdir={':'.join(lower)},upperdir=disk/upper,workdir=disk/work"
        linux.mount("overlay", "root", "overlay", linux.MS_NODEV, options)
    os.chdir("/")
    return place / "root"


def _attach(source: Path, target: Path, user_namespace: int) -> None:
    target.mkdir()
    linux.bind(source, target, user_namespace)
