"""Boxes by an OCI runtime: crun, or runc by a setting. What exists of a box, in the order of its making:

a slot (ids, network)     held by the server's descriptors until the box holds it
<run>/<instance>/boxes/<box>  config.json, agent.sock, runtime.log; box.json last: without it the box is half made
<state>/disks/<box>           its writable layer
cgroups                       named by the box
<run>/<instance>/runtime      the runtime's own state

The first is made first and removed last: without it nothing else of the box is there, as long as the machine runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import structlog

from devboxd.agent import agent_binary
from devboxd.concurrency.tasks import Tasks
from devboxd.concurrency.threads import finished, in_own_thread, readable
from devboxd.config import Settings
from devboxd.engine import bundle, cgroups, linux, machine, manifest, rootfs
from devboxd.engine.base import BoxEnd, BoxSpec, EngineError, Figures, Resources
from devboxd.engine.blockdevices import below
from devboxd.engine.disks import Disks
from devboxd.engine.fallback import Fallback
from devboxd.engine.instance import Instance
from devboxd.engine.lxcfs import Lxcfs
from devboxd.engine.namespaces import Slot, Slots
from devboxd.engine.network import Network
from devboxd.engine.places import Places
from devboxd.engine.pool import Pool, PoolBroken
from devboxd.engine.processes import run_for, which
from devboxd.engine.reserve import Reserve
from devboxd.engine.spares import Spares
from devboxd.engine.turns import Turns
from devboxd.engine.uncounted import Uncounted
from devboxd.engine.upkeep import Upkeep
from devboxd.errors import SetupError
from devboxd.path_errors import reason

_log = structlog.get_logger(__name__)

_START_S = 10.0
"""How long the runtime may take. What a box left on its disk must not hold it up for longer."""
_PLACE_S = 2.0
_END_S = 60
_FULL = "the pool of disks is full: what it has left is kept for the devboxes that there are"
_NO_ROOM = "error 524"
"""So a runtime says that the kernel has no room for another compiled filter of system calls."""
_NO_ROOM_PAUSES_S = (0.05, 0.2, 0.5, 1.0)
_ENTER = """
for f in $ENTRANCES; do echo 0 >"$f" || exit 1; done
echo 0 >/proc/self/oom_score_adj
exec "$@" 3<&0 </dev/null
"""
"""Enters the cgroups and hands the socket on as descriptor 3, in the one process that then becomes the runtime.

While it still has the host's privileges it also takes back what spares the server when memory runs out: else any
process of the box could later claim the same for itself.
"""


@dataclass(frozen=True)
class Record:
    """What box.json says. A pid means something together with the start time and the run of the machine."""

    boot: str
    pid: int
    started: int
    slot: int
    disk_bytes: int

    def lives(self) -> bool:
        """Whether this very process exists."""
        return self.boot == linux.boot_id() and linux.start_time(self.pid) == self.started


class OciEngine:
    """The engine of one instance. See `Engine` for what each method promises."""

    def __init__(
        self,
        settings: Settings,
        instance: Instance,
        network: Network,
        note_failure: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """`note_failure` notes whether the storage fails, which may end boxes, or have them ended.

        Raises SetupError when the runtime, libseccomp or the controllers of cgroups are missing."""
        runtime = which(settings.runtime)
        if runtime is None:
            raise SetupError(
                f"cannot find the OCI runtime {settings.runtime!r}; install it (Debian, Ubuntu: apt-get install crun)"
            )
        self._runtime = runtime
        self._is_crun = "crun" in Path(runtime).name
        self._instance = instance
        self._network = network
        self._agent = instance.state / "agent"
        self._boxes = instance.directory / "boxes"
        self._place = instance.directory / "mnt"
        self._states = instance.directory / "runtime"
        self._slots = Slots(instance, network, settings.pool_size)
        self._pool = Pool(instance.state)
        self._disks = Disks(self._pool)
        self._reserve = Reserve(instance.state)
        self._note_failure = note_failure
        self._settings = settings
        self._cgroups = cgroups.find(instance.id, pace=settings.disk_bytes_per_second)
        fallback = Fallback(self._cgroups.root_processes)
        self._upkeep = Upkeep(self._pool, self._disks, self._reserve, fallback, note_failure)
        self._lxcfs = Lxcfs(instance.directory, self._cgroups)
        self._calls = bundle.Seccomp(settings.nested_user_namespaces, compiled=self._is_crun)
        self._starts = Places(2 * (os.cpu_count() or 1), _PLACE_S)
        self._removals = asyncio.Semaphore(2)
        self._fetches = asyncio.Semaphore(2)
        self._uncounted = Uncounted()
        self._still = asyncio.Lock()
        self._spares = Spares(self._disks)
        self._limits: dict[str, Resources] = {}
        """What was last set for each living box, as far as this server did it."""
        self._tasks = Tasks()

    async def open(self, kept: Collection[str] = ()) -> None:
        """Make the folders, remove half-made boxes and disks that nobody wants, take back slots, fill the pool."""
        linux.spare_from_oom(-900)
        for folder in (self._boxes, self._states):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._place.mkdir(mode=0o755, exist_ok=True)
        self._agent = bundle.keep_agent(agent_binary(), self._instance.state / "agent")
        try:
            await self._open(kept)
        except BaseException:
            await self.close()
            raise

    async def _open(self, kept: Collection[str]) -> None:
        await finished(self._reserve.tend)
        await self.recover()
        if self._settings.disk_bytes_per_second:
            self._cgroups.disks = await finished(self._disks_below)
        self._cgroups.open()
        disks = self._disks.boxes()
        records = {box_id: self._record(box_id) for box_id in self._traces() | disks}
        for box_id in (box_id for box_id, record in records.items() if record is None and box_id not in kept):
            _log.info("removing a half-made box", box=box_id)
            await self._clear(box_id)
            await finished(partial(self._disks.remove, box_id))
        known = [record for record in records.values() if record and record.boot == linux.boot_id()]
        slots = map(self._disks.slot, disks.intersection(kept))
        resting = {slot for slot in slots if slot is not None}
        for box_id, record in records.items():
            if record and record.lives() and box_id in disks:
                try:
                    await finished(partial(self._disks.adopt, box_id, record.disk_bytes))
                except OSError as error:
                    _log.error("the disk of a box cannot be looked at; the box goes on", box=box_id, error=str(error))
        await self._network.open()
        await self._network.adopt({r.slot: Path(f"/proc/{r.pid}/ns/net") for r in known if r.lives()})
        await self._slots.open({record.slot for record in known} | resting)
        await self._lxcfs.open(self._living)
        self._tasks.start(self._lxcfs.keep(self._living), "lxcfs")
        self._tasks.start(self._upkeep.tend(), "storage")
        self._tasks.start(self._upkeep.trim(), "room of deleted files")
        self._tasks.start(self._spares.keep(), "spare copies of snapshots")
        self._tasks.start(Turns(self._cgroups).keep(), "turns of boxes")

    async def recover(self) -> set[str] | None:
        """Open the storage. One that is broken is opened anew, after the boxes that hold on to it were ended.

        Gives the boxes whose disks are there then, None where nothing was broken. Raises SetupError.
        """
        try:
            await finished(self._disks.open)
            return None
        except PoolBroken as error:
            _log.error("the storage is broken: its boxes are ended, and it is opened anew", reason=str(error))
        await self.let_go()
        await finished(self._pool.mend)
        await finished(self._disks.open)
        kept = self._disks.boxes()
        _log.warning("the storage was recovered", suspended=sorted(kept))
        return kept

    async def let_go(self) -> set[str]:
        """End all boxes for the storage's sake, and whatever else of the server's holds on to it; those boxes.

        Nothing is written to the state folder. Raises SetupError when the kernel does not let go, and EngineError.
        """
        self._note_failure(True)
        records = {box_id: self._record(box_id) for box_id in self._traces()}
        living = {box_id for box_id, record in records.items() if record and record.lives()}
        for box_id, record in records.items():  # a half-made box may run, too
            await (self._kill(record, box_id) if record else self._clear(box_id))
        await finished(self._pool.let_go)
        return living

    def _disks_below(self) -> set[str]:
        """The disks that boxes read and write. Raises SetupError when there is none to be found."""
        try:
            found = below(self._pool.folder) | below(self._settings.cache)
        except OSError as error:
            raise SetupError(f"cannot keep disk_bytes_per_second: {reason(error)}; set it to 0") from error
        if not found:
            raise SetupError(
                f"cannot keep disk_bytes_per_second: neither {self._settings.state} nor {self._settings.cache} is on a "
                "disk of this machine; set it to 0"
            )
        return found

    async def close(self) -> None:
        """Give back the pool, and all that is not needed while only boxes live."""
        await self._tasks.close()
        if not any(self._boxes.iterdir()):
            await self._lxcfs.close()
        await self._slots.close()
        await self._network.close()
        self._cgroups.close()
        self._disks.close()

    async def create(self, spec: BoxSpec) -> None:
        """Make and start a box. A living box of this id gets the limits; what is left of another is removed first."""
        if (record := self._record(spec.box_id)) and record.lives():
            if self._limits.get(spec.box_id) != spec.resources:
                await self.resize(spec.box_id, spec.resources)
            self._disks.credits.wake(spec.box_id)
            return
        async with self._starts.taken():
            if (self._boxes / spec.box_id).exists():
                await self.stop(spec.box_id)
            kept = self._disks.slot(spec.box_id)
            slot = await self._slots.take(kept)
            try:
                if spec.snapshot_id is not None and not self.has_disk(spec.box_id):
                    async with self._fetches:
                        await self._disks.fetch(spec.box_id, spec.snapshot_id)
                await in_own_thread(lambda: self._make(spec, slot))
                await finished(partial(self._finish, spec, slot.index))
                self._limits[spec.box_id] = spec.resources
                if kept is None:
                    self._spares.used(spec.snapshot_id, spec.resources.disk_bytes)
            except BaseException as error:
                await self._clear(spec.box_id)
                if kept is not None:
                    await self._leave(spec.box_id)
                else:
                    await finished(partial(self._disks.remove, spec.box_id))
                    await self._slots.release(slot.index)
                if isinstance(error, (OSError, subprocess.SubprocessError)):
                    raise EngineError(f"cannot make the box {spec.box_id}: {error}") from error
                raise
            finally:
                slot.close()

    async def destroy(self, box_id: str) -> None:
        """Kill everything in the box and free all that it held."""
        slot = await self._end(box_id)
        async with self._removals:  # who waits here can be cancelled, when the server stops: the next one goes on
            await self._remove(box_id)
        if slot is not None:
            await self._slots.release(slot)

    async def stop(self, box_id: str) -> None:
        """Kill everything in the box; its disk stays, and the slot is kept for it."""
        slot = await self._end(box_id)
        await self._leave(box_id)
        if slot is not None:
            await self._slots.rest(slot)

    async def _leave(self, box_id: str) -> None:
        if (leaving := await finished(partial(self._disks.leave, box_id))) is not None:
            self._upkeep.leaving.append(leaving)

    async def _end(self, box_id: str) -> int | None:
        """Kill everything in the box and clear up; its slot."""
        self._limits.pop(box_id, None)
        record = self._record(box_id)
        slot = record.slot if record and record.boot == linux.boot_id() else self._disks.slot(box_id)
        if record and record.lives():
            await self._kill(record, box_id)
        await self._clear(box_id)
        return slot

    async def resize(self, box_id: str, resources: Resources) -> None:
        """Other limits for a box that lives."""

        def limit() -> None:
            self._cgroups.limit(box_id, resources)
            self._disks.limit(box_id, resources.disk_bytes)
            if record := self._record(box_id):
                self._write(box_id, replace(record, disk_bytes=resources.disk_bytes))

        self._limits.pop(box_id, None)
        try:
            await finished(limit)
            self._limits[box_id] = resources
        except OSError as error:
            raise EngineError(f"cannot set the limits of the box {box_id}: {error}") from error

    async def freeze(self, box_id: str) -> None:
        """By its cgroup."""
        await self._cgroups.freeze(box_id)

    async def thaw(self, box_id: str) -> None:
        """By its cgroup."""
        self._cgroups.thaw(box_id)

    async def snapshot(self, box_id: str, snapshot_id: str) -> None:
        """In a moment where the pool can; else the box stands still while its disk is copied."""
        try:
            if self._pool.copies:
                await finished(partial(self._disks.snapshot, box_id, snapshot_id))
            else:
                async with self._still:  # one after the other: the next one of a box must not find it going on again
                    await self._copy_still(box_id, snapshot_id)
        except OSError as error:
            raise EngineError(f"cannot keep the disk of {box_id}: {error}") from error

    async def _copy_still(self, box_id: str, snapshot_id: str) -> None:
        lives = (record := self._record(box_id)) is not None and record.lives()
        try:
            if lives:
                await self._cgroups.freeze(box_id)
            await self._disks.copy(box_id, snapshot_id)
        finally:
            if lives:
                self._cgroups.thaw(box_id)

    async def snapshot_size(self, snapshot_id: str) -> int:
        """By the pool's counts, or by reading all names."""
        try:
            return await self._disks.size(snapshot_id)
        except OSError as error:
            raise EngineError(f"cannot measure {snapshot_id}: {error}") from error

    async def snapshot_digest(self, snapshot_id: str) -> str:
        """Of what a box sees over its image."""
        try:
            async with self._disks.reading(snapshot_id) as folder:
                return await manifest.digest(folder)
        except OSError as error:
            raise EngineError(f"cannot read {snapshot_id}: {error}") from error

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Its room comes back a little later."""
        async with self._removals:
            await self._remove(snapshot_id)

    async def _remove(self, name: str) -> None:
        try:
            await finished(partial(self._disks.remove, name))
        except OSError as error:
            raise EngineError(f"cannot delete the disk {name}: {error}; look at the disk's health") from error

    async def snapshots(self) -> set[str]:
        """By the folders in the pool."""
        return await finished(self._disks.snapshots)

    def has_disk(self, box_id: str) -> bool:
        """By its folder in the pool."""
        return self._disks.path(box_id).exists()

    def disk_used(self, name: str) -> int | None:
        """From its file system."""
        return self._disks.used(name)

    def disk_room(self, box_id: str) -> float | None:
        """From its file system."""
        return self._disks.room(box_id)

    def cpu_seconds(self, box_id: str) -> float:
        """From its cgroup."""
        return self._cgroups.cpu_seconds(box_id)

    def short_of(self) -> str | None:
        """Asks the disk below the pool, and the pool."""
        try:
            return self.trouble or self._pool.short_of() or (_FULL if self._disks.credits.short() else None)
        except OSError as error:
            return f"the storage cannot be looked at: {error}"

    async def short_for(self, name: str) -> str | None:
        """Asks the pool. What is not there is told by what is done with it."""
        with contextlib.suppress(FileNotFoundError):
            return await finished(partial(self._disks.lack, name))
        return None

    @property
    def disks_held(self) -> bool:
        """As it was found when the pool was last looked at."""
        return self._upkeep.full

    @property
    def trouble(self) -> str | None:
        """As it was found when the pool was last looked at."""
        return self._upkeep.trouble

    async def boxes(self) -> dict[str, bool]:
        """All boxes with a trace, and whether their pid 1 lives."""
        records = {box_id: self._record(box_id) for box_id in self._traces()}
        return {box_id: bool(record and record.lives()) for box_id, record in records.items()}

    async def wait(self, box_id: str) -> BoxEnd:
        """Return when pid 1 has ended."""
        record = self._record(box_id)
        status = None
        if record and (pidfd := _pidfd(record)) is not None:
            try:
                await readable(pidfd)
                status = linux.exit_status(record.pid, pidfd)
            finally:
                os.close(pidfd)
        killed = status in (None, 128 + signal.SIGKILL)
        return BoxEnd(oom=killed and self.oom_kills(box_id) > 0, status=status)

    def agent_socket(self, box_id: str) -> Path:
        """The socket of the box's agent; its path may be longer than an address of a socket can be."""
        return self._boxes / box_id / "agent.sock"

    def figures(self, box_id: str) -> Figures | None:
        """From its cgroups, its link and the pool."""
        if (record := self._record(box_id)) is None or not record.lives():
            return None
        into, out_of = self._network.traffic(record.slot)
        used = self._cgroups.figures(box_id)
        return replace(used, network_in_bytes=into, network_out_bytes=out_of, disk_bytes=self.disk_used(box_id))

    def entrances(self, box_id: str) -> list[Path]:
        """By its cgroups."""
        return self._cgroups.entrances(box_id)

    def oom_kills(self, box_id: str) -> int:
        """How many processes of the box the kernel has killed for lack of memory so far."""
        return self._cgroups.oom_kills(box_id)

    def hoarders(self) -> dict[str, str]:
        """Those that take memory of the kernel which no cgroup counts."""
        return self._uncounted.hoarders(self._living)

    def _living(self) -> dict[str, int]:
        records = {box_id: self._record(box_id) for box_id in self._traces()}
        return {box_id: record.pid for box_id, record in records.items() if record and record.lives()}

    def _record(self, box_id: str) -> Record | None:
        """None when the box is unknown or half made."""
        try:
            return Record(**json.loads((self._boxes / box_id / "box.json").read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, box_id: str, record: Record) -> None:
        new = self._boxes / box_id / "box.new"
        new.write_text(json.dumps(asdict(record)))
        new.rename(new.with_name("box.json"))

    def _traces(self) -> set[str]:
        folders = (self._boxes, self._states)
        found = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
        found |= self._cgroups.boxes()
        return {name for name in found if not name.startswith(".")}  # crun keeps a cache of its own in .cache

    def _make(self, spec: BoxSpec, slot: Slot) -> None:
        """Make and start one box, in a thread with mounts of its own: what else it started would hold the disk."""
        folder = self._boxes / spec.box_id
        folder.mkdir(mode=0o700)
        link = slot.link
        files = {
            "etc/hostname": f"{spec.hostname}\n",
            "etc/hosts": bundle.hosts(spec.hostname, link.address),
            "etc/resolv.conf": self._network.resolv_conf(link),
        }
        most = spec.resources.disk_bytes
        kept = self.has_disk(spec.box_id)
        if not kept:
            self._disks.create(spec.box_id, slot.index, files, most, spec.snapshot_id)
        if kept or spec.snapshot_id is not None:
            self._disks.lift(spec.box_id, most)
        if kept:
            self._disks.refresh(spec.box_id, files)
        self._cgroups.create(spec.box_id, spec.resources)
        with bundle.listen(folder) as listener, self._disks.tree(spec.box_id) as disk:
            linux.private_mounts()
            rootfs.assemble(self._place, spec.image.layers, disk, slot.user, self._instance.uid_base(slot.index))
            machine.lend_agent(self._place, self._agent)
            groups = self._cgroups.shown(spec.box_id)
            system = machine.make_sys(self._place, slot.net, spec.resources.cpu_cores, groups)
            system |= self._lxcfs.files()
            (folder / "config.json").write_text(json.dumps(self._config(spec, slot, system)))
            machine.lend_devices(self._place)
            self._start(spec, listener)

    def _finish(self, spec: BoxSpec, slot: int) -> None:
        """Bound the disk of a box that has started, and write down that it is whole."""
        self._disks.limit(spec.box_id, spec.resources.disk_bytes)
        pid = int((self._boxes / spec.box_id / "pid").read_text())
        started = linux.start_time(pid)
        if started is None:
            raise EngineError(f"cannot start the box {spec.box_id}: its agent ended at once")
        self._write(spec.box_id, Record(linux.boot_id(), pid, started, slot, spec.resources.disk_bytes))

    def _config(self, spec: BoxSpec, slot: Slot, system: dict[str, Path]) -> dict[str, object]:
        namespaces = [{"type": "user", "path": slot.user_path}, {"type": "network", "path": slot.net_path}]
        config = bundle.config(spec, self._place, system, namespaces, self._calls)
        if not self._is_crun:
            config["linux"] |= bundle.mappings(self._instance.uid_base(slot.index))
            config["linux"]["cgroupsPath"] = f"/{self._cgroups.name}/boxes/{spec.box_id}"
            del config["process"]["rlimits"]  # it has them before, see `_start`
        return config

    def _start(self, spec: BoxSpec, listener: socket.socket) -> None:
        box_id, folder = spec.box_id, self._boxes / spec.box_id
        command = [self._runtime, "--root", str(self._states), "--log", str(folder / "runtime.log")]
        if not self._is_crun:  # runc would set limits from outside, which wants CAP_SYS_RESOURCE in the box's namespace
            command = ["prlimit", *bundle.limits_as_options(spec.resources), *command]
        with contextlib.ExitStack() as opened:
            entrances = []
            if self._is_crun:
                command.append("--cgroup-manager=disabled")
                for path in self._cgroups.entrances(box_id):
                    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
                    opened.callback(os.close, descriptor)
                    entrances.append(f"/proc/{os.getpid()}/fd/{descriptor}")
                self._cgroups.show_unified()
            command += ["run", "--detach", "--preserve-fds", "1", "--bundle", str(folder)]
            command += ["--pid-file", str(folder / "pid"), box_id]
            environment = {"PATH": os.defpath + ":/usr/sbin:/sbin", "ENTRANCES": " ".join(entrances)}
            for pause in _NO_ROOM_PAUSES_S:
                status = run_for(_START_S, ["/bin/sh", "-c", _ENTER, "sh", *command], listener, environment)
                if not status or _NO_ROOM not in bundle.last_words(folder):
                    break
                time.sleep(pause)  # programs of other boxes that have filters end all the time
                shutil.rmtree(self._states / box_id, ignore_errors=True)
        if status is None:
            raise EngineError(f"cannot start the box {box_id}: it takes longer than {_START_S:g} s; look at its disk")
        if status:
            fate = f"was ended by signal {-status}" if status < 0 else f"said: {bundle.last_words(folder)}"
            raise EngineError(
                f"cannot start the box {box_id}: {Path(self._runtime).name} {fate}; "
                "`devboxd doctor` shows what this machine lacks"
            )

    async def _kill(self, record: Record, box_id: str) -> None:
        """SIGKILL to pid 1, which takes its whole pid namespace along, and wait for that."""
        if (pidfd := _pidfd(record)) is not None:
            try:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                self._cgroups.thaw(box_id)  # nothing that is frozen dies
                async with asyncio.timeout(_END_S):
                    await readable(pidfd)
            except TimeoutError as error:
                raise EngineError(f"cannot end the box {box_id}: pid {record.pid} ignores SIGKILL") from error
            finally:
                os.close(pidfd)

    async def _clear(self, box_id: str) -> None:
        """Remove all traces but the disk, box.json with its folder last: a cut removal is found and repeated."""
        await self._cgroups.remove(box_id)
        if not self._is_crun and (self._states / box_id).exists():
            command = (self._runtime, "--root", str(self._states), "delete", "--force", box_id)
            await finished(partial(subprocess.run, command, stderr=subprocess.DEVNULL, check=False))
        await finished(partial(self._remove_folders, box_id))

    def _remove_folders(self, box_id: str) -> None:
        shutil.rmtree(self._states / box_id, ignore_errors=True)
        shutil.rmtree(self._boxes / box_id, ignore_errors=True)


def _pidfd(record: Record) -> int | None:
    """A descriptor of the recorded process, None when it has ended. The start time is checked after opening."""
    try:
        pidfd = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return None
    if record.lives():
        return pidfd
    os.close(pidfd)
    return None
