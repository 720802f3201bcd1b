"""Which disks of the machine lie below a folder."""

from __future__ import annotations

import os
from pathlib import Path

from devboxd.engine import btrfs

_SYSFS = Path("/sys/dev/block")


def below(folder: Path) -> set[str]:
    """The numbers, as major:minor, of the whole disks that hold a folder; none where no disk does. Raises OSError."""
    number = os.stat(folder).st_dev
    devices = btrfs.devices(folder) if btrfs.holds(folder) else {f"{os.major(number)}:{os.minor(number)}"}
    return {_whole(device) for device in devices if (_SYSFS / device).exists()}


def _whole(device: str) -> str:
    """The disk of a partition; of all else, itself."""
    path = (_SYSFS / device).resolve()
    return (path.parent / "dev").read_text().strip() if (path / "partition").exists() else device
