"""Root file systems: read-only image layers below, the writable layer of a box above, joined by overlayfs.

Both are shown to the overlay through idmapped mounts, so that ids on disk start at 0 whatever range a box has, and
images are never copied or chowned. All mounts are made in a mount namespace of the starting thread and go with it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from devboxd.engine import linux

_PLAIN = "index=off,redirect_dir=off,metacopy=off"
"""A layer must be whole by itself: it is copied, and then lies on another place."""


def assemble(place: Path, layers: Iterable[Path], disk: int, user_namespace: int, uid: int) -> Path:
    """Mount a box's root at `place`/root and return that path; `uid` is the box's root on the host.

    `disk` is a descriptor of a new mount, in which the writable layer is. Only for a thread with mounts of its own: it
    changes that thread's working directory. Raises OSError.
    """
    linux.mount("tmpfs", place, "tmpfs", linux.MS_NODEV, "mode=755,size=1m")
    lower = []
    for number, layer in enumerate(layers):
        lower.append(f"l{number}")
        (place / lower[-1]).mkdir()
        linux.bind(layer, place / lower[-1], user_namespace)
    (place / "disk").mkdir()
    linux.attach(disk, place / "disk", user_namespace)
    (place / "root").mkdir()
    os.chdir(place)  # one page holds all mount options: names must be short, so relative
    with linux.file_system_ids(uid):  # root of the host has no id on the idmapped disk, and the overlay writes there
        options = f"lowerdir={':'.join(lower)},upperdir=disk/upper,workdir=disk/work,{_PLAIN}"
        linux.mount("overlay", "root", "overlay", linux.MS_NODEV, options)
    if os.statvfs("root").f_flag & os.ST_RDONLY:  # it could not make its working folder, and says so to nobody
        raise OSError(errno.ENOSPC, "cannot write to the disk: there is no room on it")
    os.chdir("/")
    return place / "root"
