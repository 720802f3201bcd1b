"""Looking into disks from outside of their boxes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from devboxd.engine import volumes


@contextmanager
def upper(state: Path, name: str, *, write: bool = False) -> Iterator[Path]:
    """What the disk of a box, or a snapshot, holds over its image, for the length of the block.

    `write`: a snapshot that was made writable is to be changed.
    """
    image = state / "disks" / name / "image"
    if not image.exists():
        yield state / "disks" / name / "upper"
        return
    with volumes.opened(image, read_only=name.startswith("snp_") and not write) as volume:
        yield volume.path / "upper"


READY = ".empty-"
"""How the names begin of disks in the pool that wait for a box."""


def volumes_of(state: Path) -> list[str]:
    """The loop devices of all disks and snapshots of a state folder."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with suppress(OSError):  # it has just gone
            if (file := backing.read_text().rstrip("\n")).startswith(f"{state}/disks/"):
                found.append(f"{backing.parts[3]} shows {file}")
    return found
