"""Devboxes from create to their end: one supervisor each performs what the states ask for.

Each change is committed before anybody hears of it. A supervisor that finds a devbox in the middle of its life, after
the server was killed, goes on where the store says: every step may be done twice and is done once.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import structlog
from sqlalchemy import Connection

from devboxd.access.files import Files
from devboxd.agent.client import AgentError
from devboxd.devboxes import store as rows
from devboxd.devboxes.prepare import PreparationError, prepare, user_of
from devboxd.devboxes.states import LIVE, TERMINAL, Event, Refusal, Status, step
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import DEFAULT_LIFE_S, CreateDevbox, StateTransition, UpdateDevbox, check_create, resources
from devboxd.engine.base import BoxEnd, BoxSpec, Engine, EngineError, Image
from devboxd.errors import ApiError, not_found
from devboxd.executions.box import Box
from devboxd.executions.looking import Looking
from devboxd.executions.running import Executions
from devboxd.http.once import Once
from devboxd.http.streams import Closing, wait
from devboxd.ids import check_id, new_id
from devboxd.store.db import Store, StoreError
from devboxd.tasks import Tasks

_log = structlog.get_logger()
ENTRYPOINT = "devboxd.entrypoint"
_BOOTS_AT_ONCE = 8
_CLOCK_LOOK_S = 10.0
_ATTACH_S = 20.0
_ATTACH_AGAIN_S = 300.0
"""Patience with the agent of a devbox that runs: an overloaded host may keep it silent, and its disk is at stake."""
_ATTACH_PAUSE_S = 0.1
_ATTACH_PAUSE_MAX_S = 2.0
_FAULTS_MAX = 4
_FAULTS_S = 300.0
"""An honest agent never breaks the protocol: past so many faults in this time the devbox is given up."""
_MEASURE_S = 1.0
_MEASURE_SHARE = 50
"""Measuring journals takes at most this part of the time."""
_LOST_WITH_POWER = frozenset({Event.BOOTED, Event.PREPARED})
"""What a power failure takes away together with the box itself; so storing it need not wait for the disk."""
_SHORT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_SWEEP_S = 3600.0
_END_S = 1.0
_FREE_S = 1.5
_STORE_AGAIN_S = 1.0
_FREE_AGAIN_S = 1.0
_FREE_AGAIN_MAX_S = 60.0
_SWEEP_AT_ONCE = 100


class BoxFailure(Exception):
    """A devbox cannot go on: the reason's name on the wire, and in words."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


@dataclass
class Life:
    """A devbox that has not been freed, and those who wait for it."""

    devbox: Devbox
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    wakes: set[asyncio.Event] = field(default_factory=set)
    supervisor: asyncio.Task[None] | None = None

    def update(self, devbox: Devbox) -> None:
        """Take the new record and wake everybody who waits for a change."""
        self.devbox = devbox
        self.changed.set()
        for event in self.wakes:
            event.set()


class Devboxes:
    """All devboxes of all accounts."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        executions: Executions,
        looking: Looking,
        files: Files,
        closing: Closing,
        *,
        environment: Mapping[str, str],
        retention_s: int,
    ) -> None:
        self._store = store
        self._engine = engine
        self._executions = executions
        self._looking = looking
        self._files = files
        self._closing = closing
        self._environment = environment
        self._retention_s = retention_s
        self._image: Image | None = None
        self._lives: dict[str, Life] = {}
        self._booting = asyncio.Semaphore(_BOOTS_AT_ONCE)
        self._tasks = Tasks()

    # -- the server comes and goes -------------------------------------------------------------------------------

    async def open(self, image: Image, rebooted: bool) -> None:
        """Reconcile the store with the machine, then supervise every devbox that lives. New ones start from `image`."""
        self._image = image
        alive = await self._engine.boxes()
        gone = 0
        for devbox in await self._store.read(rows.unfinished):
            life = self._lives[devbox.id] = Life(devbox)
            if devbox.status not in TERMINAL and devbox.status != Status.PROVISIONING and not alive.get(devbox.id):
                text = "the host was restarted and the devbox ended with it"
                if not rebooted:
                    text = "its first process ended while the server was down"
                await self._happen(life, Event.BOX_ENDED, BoxFailure("execution_failed", text))
                gone += 1
            await self._executions.adopt(self._box(devbox))  # before the first request asks for what ran
            self._begin(life)
        for box_id in alive.keys() - self._lives.keys():
            self._tasks.start(self._engine.destroy(box_id), f"remove {box_id}")
        lives = sum(life.devbox.status not in TERMINAL for life in self._lives.values())
        _log.info("devboxes of an earlier server", live=lives, ended_meanwhile=gone, host_was_restarted=rebooted)
        self._tasks.start(self._sweep(), "sweep")
        self._tasks.start(self._measure(), "measuring journals")

    async def close(self) -> None:
        """Stop supervising; the boxes go on. Devboxes that have ended are freed first, as far as that is quick."""
        freeing = [
            life.supervisor for life in self._lives.values() if life.devbox.status in TERMINAL and life.supervisor
        ]
        if freeing:
            await asyncio.wait(freeing, timeout=_FREE_S)
        await self._tasks.close()

    # -- asked by requests ---------------------------------------------------------------------------------------

    async def create(self, account: str, body: CreateDevbox, once: Once) -> Devbox:
        """Commit a new devbox and begin to make it. Raises 400 that names the field that cannot be."""
        if once.ref is not None:
            return await self.get(account, once.ref)
        launch, _ = check_create(body)
        now = _now()
        life_s = launch.keep_alive_time_seconds or DEFAULT_LIFE_S
        devbox = Devbox(
            id=new_id("dbx"),
            account_id=account,
            name=body.name or None,
            status=Status.PROVISIONING,
            create_time_ms=now,
            end_time_ms=None,
            deadline_ms=now + life_s * 1000,
            failure_reason=None,
            shutdown_reason=None,
            transitions=[StateTransition(Status.PROVISIONING, now)],
            metadata=body.metadata or {},
            launch_parameters=launch,
            environment=body.environment_variables or {},
            file_mounts=body.file_mounts or {},
            entrypoint=body.entrypoint or None,
            prepared=False,
            disk_freed=False,
            swept=False,
        )

        def insert(connection: Connection) -> None:
            rows.add(connection, devbox)
            once.bind(connection, devbox.id)

        await self._store.write(insert)
        self._lives[devbox.id] = Life(devbox)
        self._begin(self._lives[devbox.id])
        return devbox

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
        move = step(devbox.status, Event.USE_ASKED)
        if isinstance(move, Refusal):
            raise _refused(devbox, "use", move)
        return devbox

    async def page(
        self, account: str, status: str | None, starting_after: str | None, limit: int, count: bool
    ) -> tuple[list[Devbox], bool, int | None]:
        """A page of devboxes, newest first: (devboxes, whether more follow, how many match)."""
        return await self._store.read(lambda c: rows.page(c, account, status, starting_after, limit, count))

    async def update(self, account: str, devbox_id: str, body: UpdateDevbox) -> Devbox:
        """Change name or metadata; what is absent stays."""
        devbox = await self.get(account, devbox_id)
        values: dict[str, Any] = {}
        if body.name is not msgspec.UNSET and body.name is not None:
            values["name"] = body.name or None
        if body.metadata is not msgspec.UNSET and body.metadata is not None:
            values["metadata"] = body.metadata
        life = self._lives.get(devbox_id)
        if not values:
            return devbox
        if life is None:
            return await self._store.write(lambda c: rows.change(c, devbox, **values))
        async with life.lock:
            current = life.devbox
            life.update(await self._store.write(lambda c: rows.change(c, current, **values)))
            return life.devbox

    async def ask(self, account: str, devbox_id: str, event: Event) -> Devbox:
        """Let a request's event happen to a devbox. Raises the refusal of the table, 400 or 409."""
        devbox = await self.get(account, devbox_id)
        life = self._lives.get(devbox_id)
        if life is None:
            move = step(devbox.status, event)
            if isinstance(move, Refusal):
                raise _refused(devbox, event.removesuffix("_asked"), move)
            return devbox
        await self._apply(life, event)
        return life.devbox

    async def reached(self, devbox: Devbox, statuses: frozenset[str], seconds: float) -> Devbox | None:
        """The devbox as soon as its status is one of these, or None when the time is over or the server stops."""
        life = self._lives.get(devbox.id)
        if life is None:
            return devbox if devbox.status in statuses else None
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

    # -- events and their effects --------------------------------------------------------------------------------

    async def _happen(self, life: Life, event: Event, failure: BoxFailure | None = None) -> None:
        """Apply an event that nobody asked for; a store that cannot be written is tried until it can."""
        while True:
            try:
                return await self._apply(life, event, failure)
            except StoreError as full:
                _log.error("cannot store the state of a devbox; trying again", id=life.devbox.id, error=str(full))
                await asyncio.sleep(_STORE_AGAIN_S)

    async def _apply(self, life: Life, event: Event, failure: BoxFailure | None = None) -> None:
        async with life.lock:
            devbox = life.devbox
            move = step(devbox.status, event)
            if isinstance(move, Refusal):
                raise _refused(devbox, event.removesuffix("_asked"), move)
            now = _now()
            values: dict[str, Any] = {}
            if event is Event.KEEP_ALIVE_ASKED:
                seconds = devbox.launch_parameters.keep_alive_time_seconds or DEFAULT_LIFE_S
                values["deadline_ms"] = now + seconds * 1000
            if move.status != devbox.status:
                text = failure.text if failure else None
                values["status"] = move.status
                values["transitions"] = [*devbox.transitions, StateTransition(move.status, now, text)]
                values["prepared"] = devbox.prepared or move.status == Status.RUNNING
                if move.status in TERMINAL:
                    values["end_time_ms"] = now
                    values["shutdown_reason"] = move.shutdown_reason
                    values["failure_reason"] = failure.reason if failure else None
            if values:
                change = partial(rows.change, devbox=devbox, **values)
                life.update(await self._store.write(change, synced=event not in _LOST_WITH_POWER))
                _log.info("devbox", id=devbox.id, was=devbox.status, status=move.status, by=event)

    def _begin(self, life: Life) -> None:
        life.supervisor = self._tasks.start(self._supervise(life), f"devbox {life.devbox.id}")

    async def _supervise(self, life: Life) -> None:
        """The whole life of a devbox: make it, watch it, and free what it held when it has ended."""
        if life.devbox.status not in TERMINAL:
            work = asyncio.ensure_future(self._work(life))
            ended = asyncio.ensure_future(self._until_ended(life))
            try:
                await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (work, ended):
                    task.cancel()
                faults = await asyncio.gather(work, ended, return_exceptions=True)
            if life.devbox.status not in TERMINAL:  # a fault of ours: say so, do not free what is shown as running
                _log.error("a devbox is not supervised any more", id=life.devbox.id, faults=faults)
                await self._happen(life, Event.FAILED, BoxFailure("health_check_failed", "a fault of the server"))
        await self._free(life)

    async def _until_ended(self, life: Life) -> None:
        """Return when the devbox has ended by a request or by its deadline, a wall-clock time in the store."""
        while life.devbox.status not in TERMINAL:
            life.changed.clear()
            left = (life.devbox.deadline_ms - _now()) / 1000
            if left <= 0:
                await self._happen(life, Event.DEADLINE_PASSED)
            else:
                await wait(life.changed, min(left, _CLOCK_LOOK_S))

    async def _work(self, life: Life) -> None:
        """Boot, prepare and run until the devbox ends by itself."""
        try:
            await self._boot(life)
            end = asyncio.ensure_future(self._engine.wait(life.devbox.id))
            run = asyncio.ensure_future(self._run(life))
            try:
                await asyncio.wait({end, run}, return_when=asyncio.FIRST_COMPLETED)
                if run.done() and isinstance(run.exception(), BoxFailure):
                    # A dead box breaks its connection too, and its end is the better reason.
                    await asyncio.wait({end}, timeout=_END_S)
                if end.done():
                    raise self._ended(life.devbox.id, end.result())
                run.result()
            finally:
                for task in (end, run):
                    task.cancel()
                await asyncio.gather(end, run, return_exceptions=True)
        except BoxFailure as failure:
            await self._happen(life, Event.FAILED, failure)
        except PreparationError as error:
            oom = error.killed and self._engine.oom_kills(life.devbox.id) > 0
            await self._happen(
                life, Event.FAILED, BoxFailure("out_of_memory" if oom else "execution_failed", str(error))
            )
        except Exception as error:
            _log.error("a devbox failed", id=life.devbox.id, exc_info=error)
            await self._happen(life, Event.FAILED, BoxFailure("health_check_failed", str(error)))

    async def _boot(self, life: Life) -> None:
        devbox = life.devbox
        if devbox.status != Status.PROVISIONING:
            return
        if self._image is None:
            raise EngineError("cannot make a devbox: there is no image yet; run `devboxd image build`")
        spec = BoxSpec(devbox.id, "devbox-" + devbox.id[4:].lower(), self._image, resources(devbox.launch_parameters))
        async with self._booting:
            await self._engine.create(spec)
        await self._happen(life, Event.BOOTED)

    async def _run(self, life: Life) -> None:
        """Attach the agent, prepare, start the entrypoint; stay until it ends, attaching again when need be."""
        devbox = life.devbox
        box = await self._executions.adopt(self._box(devbox))
        lost = asyncio.Event()
        faults: deque[float] = deque(maxlen=_FAULTS_MAX)
        await self._attach(life, box, lost)
        steps = asyncio.ensure_future(self._steps(life, box))
        gone = asyncio.ensure_future(lost.wait())
        try:
            while not steps.done():
                await asyncio.wait({steps, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not steps.done():
                    _bear(box, faults)
                    await asyncio.sleep(_ATTACH_PAUSE_S)  # not for something: who breaks it at once keeps nobody busy
                    await self._attach(life, box, lost)
                    gone = asyncio.ensure_future(lost.wait())
            steps.result()
        finally:
            steps.cancel()
            gone.cancel()
            await asyncio.gather(steps, gone, return_exceptions=True)

    async def _attach(self, life: Life, box: Box, lost: asyncio.Event) -> None:
        """Connect to the agent, trying again for a while; without end where the server itself is short of something."""
        patience = _ATTACH_AGAIN_S if life.devbox.status == Status.RUNNING else _ATTACH_S
        deadline = time.monotonic() + patience
        pause = _ATTACH_PAUSE_S
        while True:
            lost.clear()
            try:
                async with asyncio.timeout(patience):  # an agent may name commands that begin for ever
                    return await self._executions.attach(box, self._engine.agent_socket(box.id), lost.set)
            except (AgentError, OSError) as error:
                _log.warning("an agent cannot be reached", devbox=box.id, error=str(error))
                short = isinstance(error, OSError) and error.errno in _SHORT_OF
                if not short and time.monotonic() > deadline:
                    why = str(error) or "it names commands that begin for ever"
                    raise BoxFailure("health_check_failed", f"cannot reach its agent: {why}") from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _ATTACH_PAUSE_MAX_S)

    def _box(self, devbox: Devbox) -> Box:
        return Box(devbox.id, user_of(devbox), {**self._environment, **devbox.environment})

    async def _steps(self, life: Life, box: Box) -> None:
        if life.devbox.status == Status.INITIALIZING:
            await prepare(life.devbox, box, self._executions, self._looking, self._files)
            await self._happen(life, Event.PREPARED)
        entrypoint = life.devbox.entrypoint
        if entrypoint is None:
            await asyncio.Event().wait()
        else:
            row = await self._executions.start(box.id, entrypoint, handle=ENTRYPOINT, purpose="entrypoint")
            await self._looking.completed(row)
            await self._happen(life, Event.ENTRYPOINT_ENDED)

    def _ended(self, box_id: str, end: BoxEnd) -> BoxFailure:
        if end.oom:
            return BoxFailure("out_of_memory", "its memory was not enough; ask for a larger resource size")
        return BoxFailure("execution_failed", f"its first process ended with status {end.status}")

    async def _free(self, life: Life) -> None:
        """Give back what the devbox held on the machine, end its executions, remember that this is done."""
        devbox = life.devbox
        why = f"the devbox has ended ({devbox.status})"
        pause = _FREE_AGAIN_S
        while True:
            try:
                await self._engine.destroy(devbox.id)
                break
            except (EngineError, OSError) as error:
                _log.error("cannot free a devbox; trying again", id=devbox.id, error=str(error))
            await self._executions.detach(devbox.id, why)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _FREE_AGAIN_MAX_S)
        await self._executions.detach(devbox.id, why)
        while True:
            try:
                async with life.lock:
                    freed = partial(rows.change, devbox=life.devbox, disk_freed=True)
                    life.update(await self._store.write(freed, synced=False))
                break
            except StoreError as full:
                _log.error("cannot store that a devbox is freed; trying again", id=devbox.id, error=str(full))
                await asyncio.sleep(_STORE_AGAIN_S)
        self._lives.pop(devbox.id, None)

    async def _measure(self) -> None:
        """End every devbox of which a journal takes more disk than an honest agent lets it: its agent is none."""
        while True:
            begun = time.monotonic()
            living = [life.devbox.id for life in self._lives.values() if life.devbox.status in LIVE]
            for box_id in await asyncio.to_thread(self._executions.overrun, living):
                if (life := self._lives.get(box_id)) is not None:
                    text = "a journal of its executions grew past the limit, which only a hostile first process can do"
                    await self._happen(life, Event.FAILED, BoxFailure("health_check_failed", text))
            await asyncio.sleep(max(_MEASURE_S, _MEASURE_SHARE * (time.monotonic() - begun)))

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
            before = _now() - self._retention_s * 1000
            return await self._store.read(lambda c: rows.ended_before(c, before, after, _SWEEP_AT_ONCE))
        except StoreError as error:
            _log.error("cannot look for what can be removed; trying later", error=str(error))
            return []


def _bear(box: Box, faults: deque[float]) -> None:
    """Remember a fault of the agent. Raises BoxFailure past the bound. A connection that just ends may be replaced."""
    if not box.agent.fault:
        return
    now = time.monotonic()
    if len(faults) == _FAULTS_MAX and now - faults[0] < _FAULTS_S:
        raise BoxFailure("health_check_failed", f"its agent breaks the protocol; the last time {box.agent.fault}")
    faults.append(now)


def _refused(devbox: Devbox, verb: str, refusal: Refusal) -> ApiError:
    retry = False if refusal.code == 409 else None
    return ApiError(
        refusal.code,
        f"cannot {verb.replace('_', ' ')} the devbox {devbox.id} while it is {devbox.status}: {refusal.advice}",
        retry=retry,
    )


def _now() -> int:
    return time.time_ns() // 1_000_000
