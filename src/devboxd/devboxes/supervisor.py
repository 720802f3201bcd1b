"""The supervisor of a devbox performs what its states ask for: makes it, watches it, puts it to sleep, frees it.

One that finds a devbox in the middle of its life, after the server was killed, goes on where the store says: every
step may be done twice and is done once.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import structlog

from devboxd.access.files import Files
from devboxd.agent.client import AgentError
from devboxd.devboxes.changes import BoxFailure, Changes, FailureReason, Life
from devboxd.devboxes.idle import Idle, Signs
from devboxd.devboxes.incidents import Incidents
from devboxd.devboxes.prepare import (
    PreparationError,
    handle_of,
    nothing_to_prepare,
    prepare,
    suspend_hooks,
    uid_of,
    user_of,
)
from devboxd.devboxes.states import LIVE, TERMINAL, WORK, Event, Status, Work
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import idle_policy, resources
from devboxd.engine.base import FULL, BoxEnd, BoxSpec, Engine, EngineError, Image
from devboxd.engine.machine import threads
from devboxd.errors import comes_later
from devboxd.executions.box import Box
from devboxd.executions.looking import Looking
from devboxd.executions.running import Executions
from devboxd.http.once import Once
from devboxd.http.streams import Closing

_log = structlog.get_logger()
ENTRYPOINT = "entrypoint"
_BOOTS_AT_ONCE = 8
_CLOCK_LOOK_S = 10.0
_IDLE_LOOK_S = 5.0
_IDLE_LOOKS = 8
"""So often in the idle time of its policy a devbox is looked at, at least."""
_ATTACH_S = 20.0
_ATTACH_AGAIN_S = 300.0
"""Patience with the agent of a devbox that runs: an overloaded host may keep it silent, and its disk is at stake."""
_ATTACH_PAUSE_S = 0.1
_ATTACH_PAUSE_MAX_S = 2.0
_FAULTS_MAX = 4
_FAULTS_S = 300.0
"""An honest agent never breaks the protocol: past so many faults in this time the devbox is given up."""
_SHORT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
_END_S = 1.0
_FREE_AGAIN_S = 1.0
_FREE_AGAIN_MAX_S = 60.0


@dataclass(frozen=True)
class Means:
    """What supervisors work with."""

    changes: Changes
    engine: Engine
    executions: Executions
    looking: Looking
    files: Files
    incidents: Incidents
    closing: Closing
    environment: Mapping[str, str]
    keep_memory_s: int
    images: Callable[[str | None], Image | None]
    """The image of a name; the default one of none."""


class Supervisor:
    """Supervises devboxes, each by a task that its caller owns."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._changes = means.changes
        self._clock = means.changes.clock
        self._engine = means.engine
        self._executions = means.executions
        self._looking = means.looking
        self._files = means.files
        self._booting = asyncio.Semaphore(_BOOTS_AT_ONCE)
        self.performers: dict[Work, Callable[[Life], Awaitable[None]]] = {
            Work.BOOT: self._boot,
            Work.PREPARE: self._prepare,
            Work.RUN_ENTRYPOINT: self._run_entrypoint,
            Work.SUSPEND: self._suspend,
            Work.STAY_SUSPENDED: self._stay_suspended,
            Work.FREE: self._free,
        }
        """The one function that does each work of the table, until its status is left."""

    async def supervise(self, life: Life) -> None:
        """The whole life of a devbox; returns when it has ended and all that it held is free."""
        while life.devbox.status not in TERMINAL:
            await (self._live(life) if life.devbox.status in LIVE else self._perform(life))
        await self._perform(life)

    async def _perform(self, life: Life) -> None:
        """Do the work of the status that the devbox has."""
        await self.performers[WORK[life.devbox.status]](life)

    async def _live(self, life: Life) -> None:
        """From making to the end, or to the wish to suspend it."""
        work = asyncio.ensure_future(self._work(life))
        ended = asyncio.ensure_future(self._until_left(life))
        idle = asyncio.ensure_future(self._until_idle(life))
        try:
            await asyncio.wait({work, ended, idle}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (work, ended, idle):
                task.cancel()
            faults = await asyncio.gather(work, ended, idle, return_exceptions=True)
        if life.devbox.status in LIVE:  # a fault of ours: say so, do not free what is shown as running
            _log.error("a devbox is not supervised any more", id=life.devbox.id, faults=faults)
            await self._changes.happen(life, Event.FAILED, BoxFailure("health_check_failed", "a fault of the server"))

    async def _until_left(self, life: Life) -> None:
        """Return when the devbox lives no more: by a request, or by its deadline, a wall-clock time in the store."""
        while life.devbox.status in LIVE:
            life.changed.clear()
            left = (life.devbox.deadline_ms - self._clock.now_ms()) / 1000
            if left > 0:
                await self._clock.wait(life.changed, min(left, _CLOCK_LOOK_S))
            elif life.snapshots:
                await self._clock.wait(life.changed, _CLOCK_LOOK_S)
            else:
                await self._changes.happen(life, Event.DEADLINE_PASSED)

    # -- idle ----------------------------------------------------------------------------------------------------

    async def _until_idle(self, life: Life) -> None:
        """Look at the devbox now and then; when it has been idle for as long as its policy says, act on that.

        Without a policy it is never due.
        """
        policy = idle_policy(life.devbox.launch_parameters)
        if policy is None:
            await asyncio.Event().wait()
            return
        idle = Idle(life.devbox.idle_since_ms)
        never = asyncio.Event()
        looked, used = self._clock.seconds(), self._engine.cpu_seconds(life.devbox.id)
        while True:
            left = idle.left_s(self._clock.now_ms(), policy.idle_time_seconds)
            await self._clock.wait(never, min(_IDLE_LOOK_S, max(left, 0.05), policy.idle_time_seconds / _IDLE_LOOKS))
            if life.devbox.status is not Status.RUNNING:
                continue
            now, cpu = self._clock.seconds(), self._engine.cpu_seconds(life.devbox.id)
            signs = self._signs(life, (cpu - used) / max(now - looked, 0.001))
            looked, used = now, cpu
            was, idle = idle, idle.look(self._clock.now_ms(), signs)
            life.awake = signs.reasons()
            if was != idle:
                await self._changes.note(life, idle_since_ms=idle.since_ms)
            if (was.since_ms is None) != (idle.since_ms is None):
                _log.info("devbox idle" if not life.awake else "devbox in use", id=life.devbox.id, by=life.awake)
            if idle.since_ms is not None and idle.left_s(self._clock.now_ms(), policy.idle_time_seconds) <= 0:
                suspend = policy.on_idle == "suspend"
                event = Event.IDLE_TO_SUSPEND if suspend else Event.IDLE_TO_SHUTDOWN
                await self._changes.happen(life, event)

    def _signs(self, life: Life, cpu_share: float) -> Signs:
        box = self._executions.box(life.devbox.id)
        if box is None:
            return Signs(0, (), 0, cpu_share, bool(life.snapshots))
        commands = sum(running.row.purpose != "entrypoint" for running in box.running.values())
        uses = tuple(sorted(kind for kind, number in box.uses.items() if number > 0))
        return Signs(commands, uses, box.touched_ms, cpu_share, bool(life.snapshots))

    # -- asleep --------------------------------------------------------------------------------------------------

    async def _suspend(self, life: Life) -> None:
        """Run the hooks, then end all processes, or freeze them for a while; the disk stays."""
        devbox = life.devbox
        await self._until_copied(life)
        if life.devbox.status is not Status.SUSPENDING:
            return
        if (box := self._executions.box(devbox.id)) is not None:
            await self._find_again(life, box)
            await suspend_hooks(devbox, box, self._executions, self._looking)
            await self._executions.records.keep(box)
        if self._means.keep_memory_s > 0:
            try:
                await self._engine.freeze(devbox.id)
                life.frozen = True
            except EngineError as error:
                _log.warning("cannot keep the memory of a devbox", id=devbox.id, error=str(error))
        if not life.frozen:
            await self._stop(life)
        await self._changes.happen(life, Event.SUSPENDED)

    async def _until_copied(self, life: Life) -> None:
        """Return when no snapshot is being taken: what is kept of a disk is kept before anybody touches it."""
        while life.snapshots:
            life.changed.clear()
            await life.changed.wait()

    async def _find_again(self, life: Life, box: Box) -> None:
        """Reach the agent again where an earlier server was killed meanwhile, and hear what has ended since.

        What fails is logged: the disk is kept all the same.
        """
        if box.attached or not (await self._engine.boxes()).get(box.id):
            return
        try:
            await self._attach(life, box, asyncio.Event())
        except BoxFailure as failure:
            _log.warning("suspending without its agent", id=box.id, error=failure.text)

    async def _stay_suspended(self, life: Life) -> None:
        """Until the devbox is resumed or ends. Frozen processes are ended when their time is over."""
        while life.devbox.status is Status.SUSPENDED:
            life.changed.clear()
            since = life.devbox.transitions[-1].transition_time_ms
            left = since / 1000 + self._means.keep_memory_s - self._clock.now_ms() / 1000
            if life.frozen and left > 0:
                await self._clock.wait(life.changed, min(left, _CLOCK_LOOK_S))
                continue
            async with life.memory:
                if life.devbox.status is Status.SUSPENDED:
                    await self._stop(life)
                    life.frozen = False
            if life.devbox.status is Status.SUSPENDED:
                await life.changed.wait()

    async def thaw(self, life: Life, once: Once | None) -> bool:
        """Let the frozen processes of a suspended devbox go on, as `once` asks; False when there are none any more."""
        async with life.memory:
            if not life.frozen or life.devbox.status is not Status.SUSPENDED:
                return False
            await self._changes.apply(life, Event.THAWED, once=once)
            life.frozen = False
            await self._engine.thaw(life.devbox.id)  # last: a server that dies before is followed by one that does it
            return True

    async def _stop(self, life: Life) -> None:
        """End everything in the box; the disk stays."""
        await self._repeat(life, self._engine.stop, "the devbox was suspended")

    # -- from making to the end ----------------------------------------------------------------------------------

    async def _work(self, life: Life) -> None:
        """Boot, prepare and run until the devbox ends by itself."""
        try:
            if life.devbox.status is Status.PROVISIONING:
                await self._perform(life)
            end = asyncio.ensure_future(self._engine.wait(life.devbox.id))
            run = asyncio.ensure_future(self._run(life))
            try:
                await asyncio.wait({end, run}, return_when=asyncio.FIRST_COMPLETED)
                if run.done() and isinstance(run.exception(), BoxFailure):
                    # A dead box breaks its connection too, and its end is the better reason.
                    await asyncio.wait({end}, timeout=_END_S)
                if end.done():
                    if self._means.closing.begun:  # perhaps the whole machine ends: the next server knows
                        await asyncio.Event().wait()
                    if self._engine.trouble and life.devbox.status is not Status.PROVISIONING:
                        text = "the storage of the host failed; its processes have ended, its disk is kept: resume it"
                        await self._changes.happen(life, Event.HOST_RESTARTED, BoxFailure("execution_failed", text))
                        return
                    raise self._ended(life.devbox.id, end.result())
                run.result()
            finally:
                for task in (end, run):
                    task.cancel()
                await asyncio.gather(end, run, return_exceptions=True)
        except BoxFailure as failure:
            await self._fail(life, failure)
        except PreparationError as error:
            await self._fail(life, BoxFailure(self._lack(life.devbox.id, error), str(error)))
        except Exception as error:
            _log.error("a devbox failed", id=life.devbox.id, exc_info=error)
            await self._fail(life, BoxFailure("health_check_failed", str(error)))

    def _lack(self, box_id: str, error: PreparationError) -> FailureReason:
        """What a step before `running` failed for, by its name on the wire."""
        if error.killed and self._engine.oom_kills(box_id) > 0:
            return "out_of_memory"
        room = self._engine.disk_room(box_id)
        return "out_of_disk" if room is not None and room < FULL else "execution_failed"

    async def _fail(self, life: Life, failure: BoxFailure) -> None:
        """A devbox that cannot be resumed goes back to sleep: its disk is worth more than its processes."""
        await self._changes.happen(life, Event.RESUME_FAILED if life.resuming else Event.FAILED, failure)

    async def _boot(self, life: Life) -> None:
        """Make the box."""
        devbox = life.devbox
        image = self._means.images(devbox.image)
        if image is None:
            raise BoxFailure(
                "health_check_failed", f"cannot start it: its image {devbox.image} is gone; was the cache deleted?"
            )
        limits = resources(devbox.launch_parameters)
        spec = BoxSpec(devbox.id, hostname(devbox.id), image, limits, devbox.snapshot_id)
        async with self._booting:
            await self._engine.create(spec)
        life.image = image.name
        if not nothing_to_prepare(devbox):
            await self._changes.happen(life, Event.BOOTED, image=image.name)

    async def _run(self, life: Life) -> None:
        """Attach the agent, prepare, start the entrypoint; stay until it ends, attaching again when need be.

        Steps that met no agent are done again; if it never comes back, or has ended, that is the reason to tell.
        """
        devbox = life.devbox
        box = await self._executions.adopt(self.box(devbox))
        lost = asyncio.Event()
        faults: deque[float] = deque(maxlen=_FAULTS_MAX)
        await self._attach(life, box, lost)
        steps = asyncio.ensure_future(self._steps(life))
        gone = asyncio.ensure_future(lost.wait())
        try:
            while True:
                await asyncio.wait({steps, gone}, return_when=asyncio.FIRST_COMPLETED)
                if steps.done() and not comes_later(steps.exception()):
                    return steps.result()
                await asyncio.sleep(_ATTACH_PAUSE_S)  # not for something: who breaks it at once keeps nobody busy
                if lost.is_set():
                    _bear(box, faults)
                    await self._attach(life, box, lost)
                    gone = asyncio.ensure_future(lost.wait())
                if steps.done():
                    steps = asyncio.ensure_future(self._steps(life))
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

    def box(self, devbox: Devbox) -> Box:
        """The devbox as a place where commands run."""
        counted = threads(resources(devbox.launch_parameters).cpu_cores)
        environment = {**self._means.environment, **counted, **devbox.environment}
        return Box(devbox.id, user_of(devbox), environment, self._clock, uid_of(devbox))

    async def _steps(self, life: Life) -> None:
        """The work of each status from the first connection to the agent on."""
        if life.devbox.status == Status.PROVISIONING:
            await self._changes.happen(life, Event.READY, image=life.image)
        while life.devbox.status in LIVE:
            await self._perform(life)

    async def _prepare(self, life: Life) -> None:
        """Write files and run the commands that come before `running`."""
        if (box := self._executions.box(life.devbox.id)) is None:
            raise RuntimeError(f"{life.devbox.id} is not in service")
        await prepare(life.devbox, box, self._executions, self._looking, self._files)
        await self._changes.happen(life, Event.PREPARED)

    async def _run_entrypoint(self, life: Life) -> None:
        """Start the entrypoint, once, and stay until it ends; without one, for as long as the devbox runs."""
        devbox = life.devbox
        if devbox.entrypoint is None:
            await asyncio.Event().wait()
            return
        handle = handle_of(devbox, ENTRYPOINT)
        row = await self._executions.start(devbox.id, devbox.entrypoint, handle=handle, purpose="entrypoint")
        await self._looking.completed(row)
        await self._changes.happen(life, Event.ENTRYPOINT_ENDED)

    def _ended(self, box_id: str, end: BoxEnd) -> BoxFailure:
        if end.oom:
            return BoxFailure("out_of_memory", "its memory was not enough; ask for a larger resource size")
        return BoxFailure("execution_failed", f"its first process ended with status {end.status}")

    async def _free(self, life: Life) -> None:
        """Give back what the devbox held on the machine, end its executions, remember that this is done."""
        await self._until_copied(life)
        await self._repeat(life, self._engine.destroy, f"the devbox has ended ({life.devbox.status})")
        await asyncio.to_thread(self._executions.records.forget, life.devbox.id)
        await self._changes.note(life, disk_freed=True)

    async def _repeat(self, life: Life, end: Callable[[str], Awaitable[None]], why: str) -> None:
        """End the box until that works, and with it all its executions."""
        await asyncio.to_thread(self._means.incidents.look, [life.devbox])
        pause = _FREE_AGAIN_S
        while True:
            try:
                await end(life.devbox.id)
                break
            except (EngineError, OSError) as error:
                _log.error("cannot end a box; trying again", id=life.devbox.id, error=str(error))
            await self._executions.detach(life.devbox.id, why)
            await asyncio.sleep(pause)
            pause = min(2 * pause, _FREE_AGAIN_MAX_S)
        await self._executions.detach(life.devbox.id, why)


def hostname(devbox_id: str) -> str:
    """The name that a devbox has for itself."""
    return "devbox-" + devbox_id[4:].lower()


def _bear(box: Box, faults: deque[float]) -> None:
    """Remember a fault of the agent. Raises BoxFailure past the bound. A connection that just ends may be replaced."""
    if not box.agent.fault:
        return
    now = time.monotonic()
    if len(faults) == _FAULTS_MAX and now - faults[0] < _FAULTS_S:
        raise BoxFailure("health_check_failed", f"its agent breaks the protocol; the last time {box.agent.fault}")
    faults.append(now)
