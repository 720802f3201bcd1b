"""Memory of the kernel that boxes take and no cgroup counts: messages that netlink sockets keep, and locks of files.

Neither has a bound that could be set for a box. So one number of the whole machine is read at each look, and only when
it has grown by much each box is measured; one that holds more than any honest program is to be ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from devboxd.engine import figures

_PROC = Path("/proc")
_GROWTH_KIB = 128 << 10
_MOST_UNREAD = 64 << 20
_MOST_LOCKS = 10_000
_LOOK_BYTES = 1 << 20
"""How much of the list of locks is read, the newest first: the kernel takes longer for each further part."""


class Uncounted:
    """Looks at the memory of the kernel. For one thread at a time."""

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._level = 0
        """What the kernel had taken, in KiB, when no box had too much."""

    def hoarders(self, living: Callable[[], Mapping[str, int]]) -> dict[str, str]:
        """The boxes that hold too much, and in words what. `living` finds all boxes and the first process of each."""
        now = int(figures.words(self._proc / "meminfo").get("SUnreclaim:", "0").split()[0])
        self._level = min(self._level, now)
        if now < self._level + _GROWTH_KIB:
            return {}
        boxes = living()
        found = {
            box: f"its netlink sockets keep {unread >> 20} MiB of the kernel's memory in messages that nobody reads"
            for box, pid in boxes.items()
            if (unread := self._unread(pid)) > _MOST_UNREAD
        }
        found |= {
            box: f"it holds more than {_MOST_LOCKS} locks of files, for which the kernel's memory has no bound"
            for box, number in self._locks(boxes).items()
            if number > _MOST_LOCKS
        }
        if not found:
            self._level = now
        return found

    def _unread(self, pid: int) -> int:
        """Bytes that all netlink sockets of a process's network namespace keep."""
        with suppress(OSError):
            rows = (self._proc / str(pid) / "net/netlink").read_text().splitlines()[1:]
            return sum(int(row.split()[4]) for row in rows)
        return 0

    def _locks(self, boxes: Mapping[str, int]) -> Counter[str]:
        """How many of the newest locks of the machine each box holds.

        A lock tells its process only when that alone may open it again, so first the file system counts, if it is that
        of one box.
        """
        with open(self._proc / "locks", "rb") as file:
            rows = [line.split() for line in file.read(_LOOK_BYTES).decode(errors="replace").splitlines()]
        seen = Counter((row[4], row[5].rpartition(":")[0]) for row in rows if len(row) == 8)
        held: Counter[str] = Counter()
        if seen.total() > _MOST_LOCKS:
            owners = self._owners(boxes)
            for (pid, device), number in seen.items():
                if box := owners.get(device) or self._box(pid):
                    held[box] += number
        return Counter({box: number for box, number in held.items() if box in boxes})

    def _owners(self, boxes: Mapping[str, int]) -> dict[str, str]:
        """The file systems, as /proc/locks names them, that one box sees and neither another one nor the host."""
        owners = dict.fromkeys(self._devices("self"), "")
        for box, pid in boxes.items():
            for device in self._devices(str(pid)):
                owners[device] = "" if device in owners else box
        return owners

    def _devices(self, pid: str) -> set[str]:
        with suppress(OSError):
            words = (row.split()[2] for row in (self._proc / pid / "mountinfo").read_text().splitlines())
            return {"{:02x}:{:02x}".format(*map(int, word.split(":"))) for word in words}
        return set()

    def _box(self, pid: str) -> str | None:
        with suppress(OSError):
            for line in (self._proc / pid / "cgroup").read_text().splitlines():
                if "/boxes/" in line:
                    return line.rpartition("/boxes/")[2].partition("/")[0]
        return None
