"""A disk whose device can be made to fail, where the kernel has a device mapper for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from support.disk import Disk

_TABLES = {
    "linear": "linear {device} 0",
    "error": "error",
    "flakey": "flakey {device} 0 0 3600 1 error_writes",
}
"""What a device does: all is well; every read and write fails; every write fails, for an hour."""


def lack(target: str) -> str | None:
    """Why this machine cannot make a device fail in this way; None when it can."""
    if shutil.which("dmsetup") is None:
        return "dmsetup is missing (package dmsetup)"
    modprobe = shutil.which("modprobe")
    for module in ("dm-mod", f"dm-{target}") if modprobe else ():
        subprocess.run([modprobe or "", "--quiet", module], check=False)
    if "device-mapper" not in Path("/proc/devices").read_text().split():
        return "this kernel has no device mapper"
    known = subprocess.run(["dmsetup", "targets"], capture_output=True, text=True, check=True).stdout
    if target not in {line.split()[0] for line in known.splitlines()}:
        return f"this kernel's device mapper has no target {target}"
    return None


class Mapped(Disk):
    """A disk on a device of the device mapper, which is `linear` to begin with."""

    def __init__(self, folder: Path, name: str, device: str) -> None:
        super().__init__(folder)
        self.name = name
        size = subprocess.run(["blockdev", "--getsz", device], capture_output=True, text=True, check=True).stdout
        self._tables = {name: f"0 {size.strip()} {table.format(device=device)}" for name, table in _TABLES.items()}
        dmsetup("create", name, "--table", self._tables["linear"])

    def become(self, target: str) -> None:
        """Let the device do something else from now on; what was on its way is not waited for."""
        dmsetup("suspend", "--nolockfs", "--noflush", self.name)
        dmsetup("load", self.name, "--table", self._tables[target])
        dmsetup("resume", self.name)

    def mend(self) -> None:
        """Exchange the device, then as for any disk."""
        self.become("linear")
        super().mend()


def dmsetup(*arguments: str) -> None:
    """Run the tool of the device mapper. It makes its device files itself, whether there is a udev or not."""
    environment = {**os.environ, "DM_DISABLE_UDEV": "1"}
    subprocess.run(["dmsetup", *arguments], env=environment, check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def mapped_disk(megabytes: int) -> Iterator[Mapped]:
    """Such a disk in a file of this size, mounted; all of it is gone after the block."""
    with tempfile.TemporaryDirectory(prefix="devboxd-disk-", dir="/var/tmp") as name, contextlib.ExitStack() as undo:
        image, folder = Path(name, "image"), Path(name, "disk")
        folder.mkdir()
        with image.open("wb") as file:
            file.truncate(megabytes << 20)
        loop = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=True)
        undo.callback(subprocess.run, ["losetup", "--detach", loop.stdout.strip()], check=False)
        disk = Mapped(folder, Path(name).name, loop.stdout.strip())
        undo.callback(dmsetup, "remove", "--retry", disk.name)
        device = f"/dev/mapper/{disk.name}"
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", device], check=True)
        subprocess.run(["mount", device, folder], check=True)
        undo.callback(subprocess.run, ["umount", folder], check=True)
        undo.callback(disk.become, "linear")
        yield disk
