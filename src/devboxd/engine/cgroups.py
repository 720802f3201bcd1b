"""Limits of boxes by cgroups, version 1 and 2 behind one interface.

    <hierarchy>/devboxd-<instance>/server        the server, ten times the CPU weight of all boxes together
                                  /boxes/<box>   one per box

While boxes want more processors than there are, they are idle (cpu.idle) beside the server, where the kernel has that:
it runs at once when it wakes up. Not always, for then an agent that it has just woken waits longer. A server that
systemd started stays in the cgroup of its service, which is already its own; all boxes get a tenth of the usual weight
then, and are idle beside nobody, for they would get nothing as long as something else on the machine is busy.

Nothing outside devboxd-<instance> is ever changed, but for controllers that version 2 wants enabled.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from devboxd import systemd
from devboxd.engine import figures, linux
from devboxd.engine.base import EngineError, Figures, Resources
from devboxd.errors import SetupError
from devboxd.path_errors import reason

ROOT = Path("/sys/fs/cgroup")
_CONTROLLERS = ("cpu", "memory", "pids")
_SHOWN = (*_CONTROLLERS, "cpuacct", "cpuset")
_PERIOD_US = 100_000
_PATIENCE_SECONDS = 10.0
_LEAST_FOR_SOCKETS = 64 << 20


class Cgroups(ABC):
    """The cgroups of one instance. Folders of boxes are named by their ids."""

    def __init__(self, instance: str, root: Path, pace: int = 0) -> None:
        """`pace`: bytes in a second that a box reads from each of `disks`, and writes to it; 0 without a bound."""
        self.name = f"devboxd-{instance}"
        self.root = root
        self.disks: Collection[str] = ()
        self._pace = pace
        self._home: Path | None = None
        self._in_unit = False

    @abstractmethod
    def tops(self) -> list[Path]:
        """The instance's folder in each hierarchy that limits boxes, the one that weighs CPU first."""

    @abstractmethod
    def hierarchies(self) -> list[Path]:
        """All hierarchies in which a runtime may have made folders for boxes."""

    @abstractmethod
    def enable(self) -> None:
        """Make limits possible below the instance's folder."""

    @abstractmethod
    def weigh(self, group: Path, percent: int) -> None:
        """Set a group's CPU weight; 100 is what each group has by itself, 0.3 what idle groups have."""

    @abstractmethod
    def limits(self, box_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        """Which file of the box gets which text, in this order."""

    @abstractmethod
    def paces(self, box_id: str, disk: str) -> Iterator[tuple[Path, str]]:
        """The same for one disk, as major:minor."""

    @abstractmethod
    def oom_kills(self, box_id: str) -> int:
        """How many processes of the box the kernel has killed for lack of memory; 0 for unknown boxes."""

    @abstractmethod
    def cpu_seconds(self, box_id: str = "") -> float:
        """Processor time that the box has used so far, or all together; 0 for unknown boxes."""

    @abstractmethod
    def figures(self, box_id: str) -> Figures:
        """What the processes of the box use; nothing is known of unknown boxes."""

    @abstractmethod
    def entrances(self, box_id: str) -> list[Path]:
        """The files into which a process with one thread writes 0 to enter the box."""

    @abstractmethod
    def shown(self, box_id: str) -> Iterator[tuple[str, Path]]:
        """The box's own groups that programs in it look for, each with its place below /sys/fs/cgroup."""

    @abstractmethod
    def show_unified(self) -> None:
        """Let the calling thread's mount namespace look like pure version 2, the only one that crun accepts."""

    def open(self) -> None:
        """Make the parents, and bring the server into its own group. Raises SetupError."""
        try:
            for top in self.tops():
                _group(top)
                _group(top / "boxes")
            self._in_unit = self._shelter_server()
            self.enable()
            if self._in_unit:
                self.weigh(self.tops()[0], 10)
            else:
                self.crowd(False)
        except OSError as error:
            raise SetupError(
                f"cannot set up cgroups in {self.tops()[0]}: {reason(error)}; be root with {self.root} writable, "
                "and inside a container the only process besides its init"
            ) from error

    def close(self) -> None:
        """Leave the server's group, and remove the parents when no box is left."""
        if self._home is not None:
            target = self._home if self._home.is_dir() else self.tops()[0].parent
            with suppress(OSError):  # a group that got children meanwhile takes no processes any more
                (target / "cgroup.procs").write_text(str(os.getpid()))
            self._home = None
        for hierarchy in self.hierarchies():
            for group in ("server", "boxes", ""):
                with suppress(OSError):
                    (hierarchy / self.name / group).rmdir()

    @abstractmethod
    def freezer(self, box_id: str) -> tuple[Path, str, str, Path, str]:
        """How a box is frozen: the file, its text for that and for the contrary; the file that tells, and its words."""

    def create(self, box_id: str, resources: Resources) -> None:
        """Make the box's cgroups with their limits."""
        for top in self.tops():
            _group(top / "boxes" / box_id)
        self.limit(box_id, resources)
        for disk in self.disks if self._pace else ():
            for file, text in self.paces(box_id, disk):
                file.write_text(text)

    async def freeze(self, box_id: str) -> None:
        """Stop all processes of the box, and return when none runs any more. Raises EngineError after ten seconds."""
        file, text, _, state, sign = self.freezer(box_id)
        try:
            file.write_text(text)
            deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
            while sign not in state.read_text():  # version 1 tells nobody when it is done
                if asyncio.get_running_loop().time() > deadline:
                    self.thaw(box_id)
                    raise EngineError(
                        f"cannot freeze the box {box_id}: a process does not stop; look for a hanging disk"
                    )
                await asyncio.sleep(0.001)
        except OSError as error:
            raise EngineError(f"cannot freeze the box {box_id}: {error}") from error

    def thaw(self, box_id: str) -> None:
        """Let the processes of the box go on. Unknown boxes are no error."""
        file, _, text, _, _ = self.freezer(box_id)
        with suppress(FileNotFoundError, ProcessLookupError):
            file.write_text(text)

    def limit(self, box_id: str, resources: Resources) -> None:
        """Set the limits of the box, also of one that lives."""
        again = []
        for file, text in self.limits(box_id, resources):
            try:
                file.write_text(text)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                again.append((file, text))  # raised above another limit, which comes after it
        for file, text in again:
            file.write_text(text)

    @property
    def defers(self) -> bool:
        """Whether the kernel has groups that are idle beside others: since 5.15."""
        return self._idle("").exists()

    def defer(self, box_id: str, behind: bool) -> None:
        """Let the box wait whenever one that is not behind wants to run. Unknown boxes are no error."""
        with suppress(OSError):  # the box may go at any time
            self._idle(box_id).write_text(str(int(behind)))

    def crowd(self, crowded: bool) -> None:
        """Give the server its ten times, beside boxes that are idle while they are `crowded`. Raises OSError."""
        if self._in_unit:
            return
        if self.defers:
            self._idle("").write_text(str(int(crowded)))
        self.weigh(self.tops()[0] / "server", 3 if crowded else 1000)

    @property
    def root_processes(self) -> Path:
        """The file with the processes of the group at the root, which shares processors with all of this server."""
        return self.tops()[0].parent / "cgroup.procs"

    def _idle(self, box_id: str) -> Path:
        return self.tops()[0] / "boxes" / box_id / "cpu.idle"

    def boxes(self) -> set[str]:
        """The boxes that have a cgroup in any hierarchy."""
        parents = [hierarchy / self.name / "boxes" for hierarchy in self.hierarchies()]
        return {folder.name for parent in parents for folder in parent.glob("*/")}

    async def remove(self, box_id: str) -> None:
        """Kill everything in the box and remove its cgroups. Unknown boxes are no error.

        The kernel takes dead processes out of their cgroup a moment after their end and version 1 announces that to
        nobody, so a busy folder is tried again, with growing pauses. Raises EngineError after ten seconds.
        """
        deadline = asyncio.get_running_loop().time() + _PATIENCE_SECONDS
        pause = 0.0005
        while folders := [f for h in self.hierarchies() if (f := h / self.name / "boxes" / box_id).is_dir()]:
            if not sum(self._remove_now(folder) for folder in folders):
                return
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError(
                    f"cannot remove the cgroup {folders[0]}: its processes do not die; look at them with ps, "
                    "and at the kernel's log for a hanging disk"
                )
            await asyncio.sleep(pause)
            pause = min(pause * 2, 0.1)

    def _remove_now(self, folder: Path) -> bool:
        """Kill what is inside and remove the folder; True when it is still busy."""
        try:
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            folder.rmdir()
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENODEV):
                raise
            return error.errno == errno.EBUSY
        return False

    def _shelter_server(self) -> bool:
        """Move the server into its group; True when it is in that of its own service and stays there.

        This comes before `enable`: version 2 enables nothing for the children of a group that has processes.
        """
        top = self.tops()[0]
        home = own_cgroup(top.parent, "cpu")
        if home.name.endswith(".service") and systemd.started():
            return True
        _group(top / "server")
        (top / "server" / "cgroup.procs").write_text(str(os.getpid()))
        self._home = home
        return False


class Version1(Cgroups):
    """A hierarchy per controller, perhaps with an empty version 2 beside them."""

    def tops(self) -> list[Path]:
        """One folder per controller; controllers mounted together share one."""
        return self._tops

    @cached_property
    def _tops(self) -> list[Path]:
        names = (*_CONTROLLERS, "cpuacct", "cpuset", "freezer", *(("blkio",) if self._pace else ()))
        found = [self.root / name for name in names if (self.root / name).exists()]
        return [path / self.name for path in dict.fromkeys(path.resolve() for path in found)]

    def hierarchies(self) -> list[Path]:
        """Each folder at the root but the aliases of controllers that are mounted together."""
        return [path for path in self.root.iterdir() if path.is_dir() and not path.is_symlink()]

    def enable(self) -> None:
        """Controllers are on everywhere; a cpuset has no processors before it is told, or told to take its parent's."""
        for group in (self.root / "cpuset" / self.name, self.root / "cpuset" / self.name / "boxes"):
            if group.exists():
                for name in ("cpuset.cpus", "cpuset.mems"):
                    (group / name).write_text((group.parent / name).read_text())
                (group / "cgroup.clone_children").write_text("1")

    def weigh(self, group: Path, percent: int) -> None:
        """1024 shares are usual."""
        (group / "cpu.shares").write_text(str(1024 * percent // 100))

    def limits(self, box_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        """Memory before memory with swap: the latter may never be the smaller of the two.

        What TCP and UDP sockets keep is counted apart here, and has a limit of its own beside that of memory.
        """
        cpu, memory, pids = (self._box(name, box_id) for name in _CONTROLLERS)
        yield cpu / "cpu.cfs_period_us", str(_PERIOD_US)
        yield cpu / "cpu.cfs_quota_us", str(_quota(resources))
        yield memory / "memory.limit_in_bytes", str(resources.memory_bytes)
        if (memory / "memory.memsw.limit_in_bytes").exists():
            yield memory / "memory.memsw.limit_in_bytes", str(resources.memory_bytes)
        yield memory / "memory.swappiness", "0"
        if (memory / "memory.kmem.tcp.limit_in_bytes").exists():
            yield memory / "memory.kmem.tcp.limit_in_bytes", str(max(_LEAST_FOR_SOCKETS, resources.memory_bytes // 16))
        yield pids / "pids.max", str(resources.pids)

    def paces(self, box_id: str, disk: str) -> Iterator[tuple[Path, str]]:
        """What the kernel writes later, of itself, belongs to nobody here."""
        for way in ("read", "write"):
            yield self._box("blkio", box_id) / f"blkio.throttle.{way}_bps_device", f"{disk} {self._pace}"

    def oom_kills(self, box_id: str) -> int:
        """From memory.oom_control."""
        return _counter(self._box("memory", box_id) / "memory.oom_control", "oom_kill")

    def cpu_seconds(self, box_id: str = "") -> float:
        """From cpuacct.usage."""
        try:
            return int((self._box("cpuacct", box_id) / "cpuacct.usage").read_text()) / 1e9
        except OSError:
            return 0.0

    def figures(self, box_id: str) -> Figures:
        """From cpuacct, memory and pids."""
        return figures.of_version_1(*(self._box(name, box_id) for name in ("cpuacct", "memory", "pids")))

    def entrances(self, box_id: str) -> list[Path]:
        """`tasks`: to move a whole process the kernel waits for a grace period (20 ms), for a thread it does not."""
        return [top / "boxes" / box_id / "tasks" for top in self.tops()]

    def freezer(self, box_id: str) -> tuple[Path, str, str, Path, str]:
        """The controller of this name."""
        state = self._box("freezer", box_id) / "freezer.state"
        return state, "FROZEN", "THAWED", state, "FROZEN"

    def shown(self, box_id: str) -> Iterator[tuple[str, Path]]:
        """Each by the name of its controller: the JVM trusts none of them where cpuset is not there."""
        for name in _SHOWN:
            if (group := self._box(name, box_id)).exists():
                yield name, group

    def show_unified(self) -> None:
        """crun refuses version 1 with controllers left to version 2, even when it is told to leave cgroups alone."""
        unified = self.root / "unified"
        if unified.is_dir():
            linux.mount(str(unified), self.root, None, linux.MS_BIND)

    def _box(self, controller: str, box_id: str) -> Path:
        return self.root / controller / self.name / "boxes" / box_id


class Version2(Cgroups):
    """One hierarchy for all."""

    def tops(self) -> list[Path]:
        """One folder."""
        return [self.root / self.name]

    def hierarchies(self) -> list[Path]:
        """One."""
        return [self.root]

    def enable(self) -> None:
        """Hand the controllers that exist down to the boxes."""
        existing = (self.root / "cgroup.controllers").read_text().split()
        names = (*_CONTROLLERS, *(("io",) if self._pace else ()))
        wanted = " ".join(f"+{name}" for name in names if name in existing)
        for group in (self.root, self.root / self.name, self.root / self.name / "boxes"):
            (group / "cgroup.subtree_control").write_text(wanted)

    def weigh(self, group: Path, percent: int) -> None:
        """A weight of 100 is usual."""
        if (group / "cpu.weight").exists():
            (group / "cpu.weight").write_text(str(percent))

    def limits(self, box_id: str, resources: Resources) -> Iterator[tuple[Path, str]]:
        """Out of memory kills one process, never all of the box: memory.oom.group is 0."""
        box = self._box(box_id)
        enabled = (self.tops()[0] / "boxes" / "cgroup.subtree_control").read_text().split()
        if "cpu" in enabled:
            yield box / "cpu.max", f"{_quota(resources)} {_PERIOD_US}"
        if "memory" in enabled:
            yield box / "memory.max", str(resources.memory_bytes)
            yield box / "memory.oom.group", "0"
            if (box / "memory.swap.max").exists():
                yield box / "memory.swap.max", "0"
        if "pids" in enabled:
            yield box / "pids.max", str(resources.pids)

    def paces(self, box_id: str, disk: str) -> Iterator[tuple[Path, str]]:
        """Of all that the box writes, also when the kernel does so later."""
        yield self._box(box_id) / "io.max", f"{disk} rbps={self._pace} wbps={self._pace}"

    def oom_kills(self, box_id: str) -> int:
        """From memory.events."""
        return _counter(self._box(box_id) / "memory.events", "oom_kill")

    def cpu_seconds(self, box_id: str = "") -> float:
        """From cpu.stat."""
        return _counter(self._box(box_id) / "cpu.stat", "usage_usec") / 1e6

    def figures(self, box_id: str) -> Figures:
        """From its one folder."""
        return figures.of_version_2(self._box(box_id))

    def entrances(self, box_id: str) -> list[Path]:
        """cgroup.procs: all threads of a process are in one cgroup here."""
        return [self._box(box_id) / "cgroup.procs"]

    def freezer(self, box_id: str) -> tuple[Path, str, str, Path, str]:
        """cgroup.freeze, and cgroup.events for having done so."""
        box = self._box(box_id)
        return box / "cgroup.freeze", "1", "0", box / "cgroup.events", "frozen 1"

    def shown(self, box_id: str) -> Iterator[tuple[str, Path]]:
        """The one that there is."""
        yield "", self._box(box_id)

    def show_unified(self) -> None:
        """Nothing: it is."""

    def _box(self, box_id: str) -> Path:
        return self.tops()[0] / "boxes" / box_id


def find(instance: str, root: Path = ROOT, pace: int = 0) -> Cgroups:
    """The version that this machine has. Raises SetupError when cpu, memory or pids cannot be limited, or a pace."""
    if (root / "cgroup.controllers").exists():
        offered = (root / "cgroup.controllers").read_text().split()
        version: Cgroups = Version2(instance, root, pace)
    else:
        offered = [path.name for path in root.iterdir()] if root.is_dir() else []
        version = Version1(instance, root, pace)
    if missing := [name for name in _CONTROLLERS if name not in offered]:
        raise SetupError(
            f"cannot limit boxes: {root} offers no cgroup controller for {', '.join(missing)}; "
            "mount cgroups, or start the kernel without options that disable them"
        )
    if pace and not {"io", "blkio"}.intersection(offered):
        raise SetupError(
            f"cannot keep disk_bytes_per_second: {root} offers no cgroup controller for disks; set it to 0, or mount "
            "blkio (version 1) or enable io (version 2)"
        )
    return version


def _group(folder: Path) -> None:
    """Make a cgroup, whatever the umask: the runtime mounts that of a box as a user whom only the mode lets through."""
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)


def own_cgroup(hierarchy: Path, controller: str) -> Path:
    """The folder of the calling process in a hierarchy; `controller` picks the line of version 1."""
    unified = hierarchy
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return hierarchy / path.lstrip("/")
        if not controllers:
            unified = hierarchy / path.lstrip("/")
    return unified


def _quota(resources: Resources) -> int:
    return max(1000, int(resources.cpu_cores * _PERIOD_US))


def _counter(file: Path, name: str) -> int:
    return int(figures.words(file).get(name, "0"))
