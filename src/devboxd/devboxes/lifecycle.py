"""All devboxes: what requests ask of them, and what the server does for them by itself.

Each change is committed before anybody hears of it (`changes`); what a change asks for is done by the supervisor of
the devbox (`supervisor`).
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import msgspec
import structlog
from prometheus_client.metrics_core import Metric
from sqlalchemy import Connection

from devboxd.concurrency.tasks import Tasks
from devboxd.concurrency.waits import wait
from devboxd.devboxes import snapshot_store
from devboxd.devboxes import store as rows
from devboxd.devboxes.changes import BoxFailure, Changes, Life, changed, deadline, refused
from devboxd.devboxes.incidents import Incidents
from devboxd.devboxes.states import LIVE, TERMINAL, Event, Refusal, Status, step
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.supervisor import Supervisor
from devboxd.devboxes.views import (
    CreateDevbox,
    StateTransition,
    UpdateDevbox,
    check_create,
    check_environment,
    resources,
)
from devboxd.devboxes.warm import Warm
from devboxd.engine.base import Engine, Figures
from devboxd.errors import bad_request, not_found, refuse_when
from devboxd.executions.directory import DevboxDirectory
from devboxd.executions.running import Executions
from devboxd.http.once import Once
from devboxd.http.streams import Closing
from devboxd.ids import check_id, new_id
from devboxd.metrics import counter, gauge
from devboxd.store.db import Store, StoreError

_log = structlog.get_logger()
_MEASURE_S = 1.0
_MEASURE_SHARE = 50
"""Measuring journals takes at most this part of the time."""
_HOARDERS_SHARE = 4
"""The same for memory that nobody counts: who takes it takes more with each second."""
_SWEEP_S = 3600.0
_FREE_S = 1.5
_SWEEP_AT_ONCE = 100
_MORE_THAN_FULL = 16 << 20
"""What a full disk may hold beyond its size: its own folders, and what was counted late."""


class Devboxes(DevboxDirectory):
    """All devboxes of all accounts."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        executions: Executions,
        changes: Changes,
        supervisor: Supervisor,
        warm: Warm,
        closing: Closing,
        incidents: Incidents,
        *,
        retention_s: int,
    ) -> None:
        self._store = store
        self._engine = engine
        self._executions = executions
        self._changes = changes
        self._supervisor = supervisor
        self._warm = warm
        self._closing = closing
        self._incidents = incidents
        self._retention_s = retention_s
        self._lives: dict[str, Life] = {}
        self._created = 0
        self._tasks = Tasks()

    # -- the server comes and goes -------------------------------------------------------------------------------

    async def kept(self) -> set[str]:
        """The devboxes whose disks are still wanted."""
        return {devbox.id for devbox in await self._store.read(rows.unfinished) if devbox.status not in TERMINAL}

    async def open(self, interruption: str | None) -> None:
        """Reconcile the store with the machine, then supervise every devbox that is not over.

        `interruption`: why no box can be alive, in words.
        """
        alive = await self._engine.boxes()
        gone = 0
        for devbox in await self._store.read(rows.unfinished):
            life = self._lives[devbox.id] = Life(devbox)
            if devbox.status in LIVE - {Status.PROVISIONING} and not alive.get(devbox.id):
                await self._missed(life, interruption)
                gone += 1
            elif _slept(life) and not self._engine.has_disk(devbox.id):
                text = "its disk is gone" if interruption is None else f"{interruption}, without its disk"
                await self._changes.happen(life, Event.DISK_LOST, BoxFailure("execution_failed", text))
            if alive.get(devbox.id):
                life.frozen = life.devbox.status is Status.SUSPENDED
                if not life.frozen:  # a server was killed while the box stood still
                    await self._engine.thaw(devbox.id)
            await self._executions.adopt(self._supervisor.box(devbox))  # before the first request asks for what ran
            self._begin(life)
        for box_id in alive.keys() - self._lives.keys():
            self._tasks.start(self._engine.destroy(box_id), f"remove {box_id}")
        lives = sum(life.devbox.status in LIVE for life in self._lives.values())
        _log.info("devboxes of an earlier server", live=lives, ended_meanwhile=gone, interruption=interruption)
        self._tasks.start(self._sweep(), "sweep")
        self._tasks.start(self._measure(), "measuring journals")
        self._tasks.start(self._end_hoarders(), "memory that nobody counts")
        self._tasks.start(self._warm.fill(), "warm boxes")

    async def _missed(self, life: Life, interruption: str | None) -> None:
        """A box has ended while no server looked."""
        if interruption and self._engine.has_disk(life.devbox.id):
            text = f"{interruption}; its processes have ended, its disk is whole: resume it"
            await self._changes.happen(life, Event.HOST_RESTARTED, BoxFailure("execution_failed", text))
            return
        text = f"{interruption}, and the devbox ended with that"
        if interruption is None:
            text = "its first process ended while the server was down"
        event = Event.RESUME_FAILED if life.resuming and interruption is None else Event.BOX_ENDED
        await self._changes.happen(life, event, BoxFailure("execution_failed", text))

    async def sleep(self, why: str, seconds: float) -> None:
        """Put all devboxes to sleep at once for the reason `why`, before the machine stops; then supervise no more.

        After `seconds` everything of them that still runs is ended as it is: on its disk it is found by the next
        server. Boxes that wait for a create end with the machine, and the next server removes what is left of them.
        """
        failure = BoxFailure("execution_failed", why)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(self._fall_asleep(life, failure) for life in self._lives.values()))
        await self._tasks.close()
        alive = [box_id for box_id, lives in (await self._engine.boxes()).items() if lives and box_id in self._lives]
        for box_id, fault in zip(
            alive, await asyncio.gather(*map(self._engine.stop, alive), return_exceptions=True), strict=True
        ):
            if fault is not None:
                _log.error("cannot end a box; the machine does", id=box_id, error=str(fault))
        _log.info("devboxes sleep; the machine stops", devboxes=len(self._lives), ended_by_force=len(alive))

    async def _fall_asleep(self, life: Life, failure: BoxFailure) -> None:
        await self._changes.happen(life, Event.HOST_STOPS, failure)
        while life.devbox.status is Status.SUSPENDING:
            life.changed.clear()
            await life.changed.wait()

    async def close(self) -> None:
        """Stop supervising; the boxes go on. Devboxes that have ended are freed first, as far as that is quick."""
        freeing = [
            life.supervisor for life in self._lives.values() if life.devbox.status in TERMINAL and life.supervisor
        ]
        if freeing:
            await asyncio.wait(freeing, timeout=_FREE_S)
        await self._tasks.close()
        await self._warm.close()

    # -- asked by requests ---------------------------------------------------------------------------------------

    async def create(self, account: str, body: CreateDevbox, once: Once) -> Devbox:
        """Commit a new devbox and begin to make it. Raises 400 that names the field that cannot be."""
        if once.ref is not None:
            return await self.get(account, once.ref)
        launch, size = check_create(body)
        environment = body.environment_variables or {}
        if body.environment_of:
            environment = {**(await self.get(account, body.environment_of)).environment, **environment}
            check_environment(environment)
        source = body.snapshot_id or None
        disk = size.disk_bytes
        image = None if source is None else await self._store.read(lambda c: _image_of(c, account, source, disk))
        refuse_when("create a devbox", self._engine.short_of())
        if source is not None:
            refuse_when("create a devbox", await self._engine.short_for(source))
        now = self._changes.clock.now_ms()
        position = new_id("dbx")
        warm_id = None if source is not None else self._warm.take(size)
        devbox = Devbox(
            id=warm_id or position,
            account_id=account,
            name=body.name or None,
            status=Status.PROVISIONING,
            create_time_ms=now,
            end_time_ms=None,
            deadline_ms=deadline(launch, now),
            failure_reason=None,
            shutdown_reason=None,
            transitions=[StateTransition(Status.PROVISIONING, now)],
            metadata=body.metadata or {},
            launch_parameters=launch,
            environment=environment,
            file_mounts=body.file_mounts or {},
            entrypoint=body.entrypoint or None,
            prepared=False,
            disk_freed=False,
            swept=False,
            snapshot_id=source,
            image=image,
            position=position,
        )

        def insert(connection: Connection) -> None:
            if source is not None:
                _image_of(connection, account, source, disk)  # it may have been deleted since
            rows.add(connection, devbox)
            once.bind(connection, devbox.id)

        life = self._lives[devbox.id] = Life(devbox)
        await self._tasks.finish(self._write_down(life, insert), f"create {devbox.id}")
        self._created += 1
        return devbox

    async def _write_down(self, life: Life, insert: Callable[[Connection], None]) -> None:
        """Commit a new devbox while its box is made already; what cannot be written down is taken back.

        Under its lock: nothing else of it is written before.
        """
        async with life.lock:
            supervisor = self._begin(life)
            try:
                await self._store.write(insert)
            except Exception:
                supervisor.cancel()
                await asyncio.wait({supervisor})
                self._tasks.start(self._engine.destroy(life.devbox.id), f"remove {life.devbox.id}")
                await self._executions.detach(life.devbox.id, "the devbox could not be written down")
                self._lives.pop(life.devbox.id, None)
                raise

    async def get(self, account: str, devbox_id: str) -> Devbox:
        """The devbox of this id. Raises 400 for a malformed id, 404 for an unknown or foreign one."""
        check_id("dbx", devbox_id, "devbox")
        life = self._lives.get(devbox_id)
        devbox = life.devbox if life else await self._store.read(lambda c: rows.get(c, devbox_id))
        if devbox is None or devbox.account_id != account:
            raise not_found(f"cannot find the devbox {devbox_id}; check the id and the account of the key")
        return devbox

    async def usable(self, account: str, devbox_id: str) -> Devbox:
        """The devbox, when commands and files can be used in it; 400 that says what to do otherwise."""
        devbox = await self.get(account, devbox_id)
        transition = step(devbox.status, Event.USE_ASKED)
        if isinstance(transition, Refusal):
            raise refused(devbox, "use", transition)
        self._touch(devbox_id)
        return devbox

    def _touch(self, devbox_id: str) -> None:
        if (box := self._executions.box(devbox_id)) is not None:
            box.touch()

    def collect(self) -> Iterator[Metric]:
        """The metrics of devboxes that have not been freed."""
        living = [life.devbox for life in self._lives.values()]
        now: Counter[tuple[str, ...]] = Counter({(str(status),): 0 for status in Status if status not in TERMINAL})
        now.update((str(devbox.status),) for devbox in living)
        yield gauge("devboxd_devboxes", "Devboxes that have not been freed", now, "status")
        yield counter("devboxd_devboxes_created", "Devboxes made by this server", {(): self._created})
        awake = (devbox for devbox in living if devbox.status in (*LIVE, Status.SUSPENDING))
        promised = sum(resources(devbox.launch_parameters).memory_bytes for devbox in awake)
        text = "Memory that devboxes may use together, as far as they are not asleep"
        yield gauge("devboxd_promised_memory_bytes", text, {(): promised})

    async def figures(self, devbox: Devbox) -> Figures | None:
        """What the devbox uses at this moment; None unless it lives."""
        return await asyncio.to_thread(self._engine.figures, devbox.id) if devbox.status in LIVE else None

    async def page(
        self, account: str, status: str | None, starting_after: str | None, limit: int, count: bool
    ) -> tuple[list[Devbox], bool, int | None]:
        """A page of devboxes, newest first: (devboxes, whether more follow, how many match)."""
        return await self._store.read(lambda c: rows.page(c, account, status, starting_after, limit, count))

    async def update(self, account: str, devbox_id: str, body: UpdateDevbox, once: Once) -> Devbox:
        """Change name or metadata; what is absent stays. A repeat does not undo what others changed since."""
        devbox = await self.get(account, devbox_id)
        values: dict[str, Any] = {}
        if body.name is not msgspec.UNSET and body.name is not None:
            values["name"] = body.name or None
        if body.metadata is not msgspec.UNSET and body.metadata is not None:
            values["metadata"] = body.metadata
        life = self._lives.get(devbox_id)
        if not values or once.ref is not None:
            return devbox
        if life is None:
            return await self._store.write(partial(changed, devbox=devbox, once=once, **values))
        async with life.lock:
            life.update(await self._store.write(partial(changed, devbox=life.devbox, once=once, **values)))
            return life.devbox

    async def ask(self, account: str, devbox_id: str, event: Event, once: Once | None = None) -> Devbox:
        """Let a request's event happen to a devbox. Raises the refusal of the table, 400 or 409.

        With `once` it happens once for each request: what changes the status would be refused the second time.
        """
        if once is not None and once.ref is not None:
            return await self.get(account, once.ref)
        devbox = await self.get(account, devbox_id)
        life = self._lives.get(devbox_id)
        if life is None:
            transition = step(devbox.status, event)
            if isinstance(transition, Refusal):
                raise refused(devbox, event.removesuffix("_asked"), transition)
            return devbox
        if event is Event.KEEP_ALIVE_ASKED:
            self._touch(devbox_id)
        if event is not Event.RESUME_ASKED or not await self._supervisor.thaw(life, once):
            if event is Event.RESUME_ASKED and life.devbox.status is Status.SUSPENDED:
                refuse_when("resume the devbox", await self._engine.short_for(devbox_id))
            await self._changes.apply(life, event, once=once)
        return life.devbox

    async def shutdown(self, account: str, devbox_id: str, force: bool) -> Devbox:
        """End a devbox. Raises 409 while a snapshot of it is being taken, unless that shall not count."""
        life = self._lives.get(devbox_id)
        busy = life is not None and life.snapshots and not force
        return await self.ask(
            account, devbox_id, Event.SHUTDOWN_DURING_SNAPSHOT_ASKED if busy else Event.SHUTDOWN_ASKED
        )

    async def life(self, account: str, devbox_id: str, event: Event) -> Life:
        """The devbox for a use of it that the table allows in its status. Raises the refusal of the table."""
        devbox = await self.get(account, devbox_id)
        transition = step(devbox.status, event)
        if isinstance(transition, Refusal):
            raise refused(devbox, event.removesuffix("_asked"), transition)
        self._touch(devbox_id)
        return self._lives[devbox_id]

    def awake(self, devbox_id: str) -> tuple[str, ...]:
        """What kept a devbox with an idle policy awake when it was last looked at."""
        life = self._lives.get(devbox_id)
        return () if life is None or life.devbox.status is not Status.RUNNING else life.awake

    @contextmanager
    def watching(self, devbox_id: str, event: asyncio.Event) -> Iterator[None]:
        """Set `event` when something happens to the devbox, until it is freed."""
        wakes = life.wakes if (life := self._lives.get(devbox_id)) is not None else set()
        wakes.add(event)
        try:
            yield
        finally:
            wakes.discard(event)

    async def reached(self, devbox: Devbox, statuses: frozenset[str], seconds: float) -> Devbox | None:
        """The devbox as soon as its status is one of these, or None when the time is over or the server stops.

        Also one that has ended is waited for: who is answered at once asks again at once.
        """
        life = self._lives.get(devbox.id) or Life(devbox)
        event = asyncio.Event()
        life.wakes.add(event)
        deadline = time.monotonic() + seconds
        try:
            with self._closing.waking(event):
                while life.devbox.status not in statuses:
                    if self._closing.begun or not await wait(event, deadline - time.monotonic()):
                        return None
                    event.clear()
                return life.devbox
        finally:
            life.wakes.discard(event)

    def _begin(self, life: Life) -> asyncio.Task[None]:
        life.supervisor = self._tasks.start(self._supervise(life), f"devbox {life.devbox.id}")
        return life.supervisor

    async def _supervise(self, life: Life) -> None:
        await self._supervisor.supervise(life)
        self._lives.pop(life.devbox.id, None)

    async def _measure(self) -> None:
        """Look what the kernel did to devboxes.

        End every one of which a journal takes more disk than an honest agent lets it: its agent is none.
        """
        while True:
            begun = time.monotonic()
            living = {life.devbox.id: life.devbox for life in self._lives.values() if life.devbox.status in LIVE}
            for box_id in await asyncio.to_thread(self._incidents.look, living.values()):
                if (life := self._lives.get(box_id)) is not None:
                    life.update(life.devbox)
            for box_id in await self._executions.measure(list(living)):
                if (life := self._lives.get(box_id)) is not None:
                    text = "a journal of its executions grew past the limit, which only a hostile first process can do"
                    await self._changes.happen(life, Event.FAILED, BoxFailure("health_check_failed", text))
            await asyncio.sleep(max(_MEASURE_S, _MEASURE_SHARE * (time.monotonic() - begun)))

    async def _end_hoarders(self) -> None:
        """End every devbox that takes what the engine cannot bound."""
        while True:
            begun = time.monotonic()
            for box_id, text in (await asyncio.to_thread(self._engine.hoarders)).items():
                if (life := self._lives.get(box_id)) is not None and life.devbox.status in LIVE:
                    await self._changes.happen(life, Event.FAILED, BoxFailure("out_of_memory", text))
            await asyncio.sleep(max(_MEASURE_S, _HOARDERS_SHARE * (time.monotonic() - begun)))

    async def _sweep(self) -> None:
        """Remove executions and journals of devboxes that ended longer ago than the retention."""
        while True:
            after = ""
            while found := await self._to_sweep(after):
                after = found[-1]
                for box_id in found:
                    try:
                        await self._executions.remove(box_id)
                        await self._store.write(partial(rows.mark_swept, devbox_id=box_id))
                    except (StoreError, OSError) as error:
                        _log.error("cannot remove what a devbox left; trying later", id=box_id, error=str(error))
            await asyncio.sleep(min(_SWEEP_S, max(1.0, self._retention_s / 24)))

    async def _to_sweep(self, after: str) -> list[str]:
        try:
            before = self._changes.clock.now_ms() - self._retention_s * 1000
            return await self._store.read(lambda c: rows.ended_before(c, before, after, _SWEEP_AT_ONCE))
        except StoreError as error:
            _log.error("cannot look for what can be removed; trying later", error=str(error))
            return []


def _image_of(connection: Connection, account: str, snapshot_id: str, disk_bytes: int) -> str | None:
    """The image below a snapshot. Raises 404 and 400 when no devbox with this disk can begin from it."""
    snapshot = snapshot_store.get(connection, snapshot_id)
    if snapshot is None or snapshot.account_id != account:
        raise not_found(f"cannot find the snapshot {snapshot_id}; check the id and the account of the key")
    if snapshot.status != snapshot_store.COMPLETE:
        raise bad_request(f"cannot start from the snapshot {snapshot_id}: it is {snapshot.status}; use a complete one")
    if (size := snapshot.size_bytes or 0) > disk_bytes + _MORE_THAN_FULL:
        raise bad_request(
            f"cannot start from the snapshot {snapshot_id}: it holds {size >> 20} MiB, and the disk of the devbox "
            f"would have {disk_bytes >> 20} MiB; ask for a larger one in launch_parameters.resource_size_request"
        )
    return snapshot.image


def _slept(life: Life) -> bool:
    """Whether all that a devbox is now lies on its disk."""
    asleep = life.devbox.status in (Status.SUSPENDING, Status.SUSPENDED)
    return asleep or (life.devbox.status is Status.PROVISIONING and life.devbox.boots > 0)
