"""Executions from their start to their end: the store first, then the agent, and every end exactly once.

The order that keeps commands from being lost: the row is committed, then the agent is told, until it knows; the agent
keeps an end until the row of the end is committed and acknowledged. After a crash `adopt` takes up what the store
knows, and `attach` brings both sides together again.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import structlog
from prometheus_client.metrics_core import Metric
from sqlalchemy import Connection

from devboxd.agent.client import AgentClient, AgentClosedError, AgentError, ExitEvent
from devboxd.agent.protocol import Entry, EntryState, Scope, Stage
from devboxd.concurrency.clock import now_ms
from devboxd.concurrency.tasks import Tasks
from devboxd.concurrency.waits import wait
from devboxd.errors import ApiError, bad_request, conflict
from devboxd.executions import store as rows
from devboxd.executions.box import Box, Boxes, patient, unreachable
from devboxd.executions.journals import Journals
from devboxd.executions.live import LiveExecution
from devboxd.executions.looking import Looking
from devboxd.executions.records import Records
from devboxd.executions.shells import (
    FAILED_BASH,
    NOT_RUN,
    READ_DRIVER,
    READ_SCRIPT,
    SHELLS_MAX,
    Shell,
    command_script,
    shell_script,
)
from devboxd.executions.starting import begin
from devboxd.executions.stdin import Stdin
from devboxd.executions.store import COMPLETED, QUEUED, RUNNING, Execution
from devboxd.executions.views import view_of
from devboxd.http.once import Once
from devboxd.ids import new_id
from devboxd.metrics import counter, gauge
from devboxd.store.db import Store, StoreError, TakenError
from devboxd.store.retry import retry_until_stored

_log = structlog.get_logger()
_HANDLE = re.compile(r"[A-Za-z0-9_-]{1,128}")
SETUP = "setup"
"""The purpose of commands that prepare a box as root."""
KILL_GRACE_S = 5.0
_ANSWER_S = 20.0
"""How long an answer waits for a start: the command is kept by then, and told when the agent listens again."""
_STARTING_S = 0.01
_STARTING_MAX_S = 1.0
_SIGKILL = 9
_KILLED, _TERMINATED = 128 + _SIGKILL, 128 + 15
_BEGINNINGS_OF_SHELLS = 3
_NO_WORD = {
    FAILED_BASH: b"devboxd: bash ended with 127 and without output: if the command did not do that, bash cannot start "
    b"here; run a command without shell_name to see why\n",
    NOT_RUN: b"devboxd: bash ended with 126 and without output: if the command did not do that, it was not run; "
    b"the user must be able to enter /run/devboxd/x, /dev/fd must lead to /proc/self/fd, and a profile must neither "
    b"end bash nor take its descriptors\n",
}
_BEGUN_ANEW = (
    "the command before ended the named shell with 127; this one begins in a new one, without variables that were not "
    "exported"
)


class Executions:
    """All executions of all devboxes."""

    def __init__(
        self,
        store: Store,
        boxes: Boxes,
        journals: Journals,
        records: Records,
        looking: Looking,
        *,
        per_box: int,
        in_all: int,
    ) -> None:
        self.stdin = Stdin(store, boxes, journals)
        self.records = records
        self._store = store
        self._journals = journals
        self._looking = looking
        self._per_box = per_box
        self._in_all = in_all
        self._running = 0
        self._started = 0
        self._completed = 0
        self._boxes = boxes
        self._tasks = Tasks()

    def collect(self) -> Iterator[Metric]:
        """The metrics of executions since the server was started."""
        yield gauge("devboxd_executions_running", "Executions that have not completed", {(): self._running})
        yield counter("devboxd_executions_started", "Executions that were begun", {(): self._started})
        yield counter("devboxd_executions_completed", "Executions that have ended", {(): self._completed})

    # -- boxes come and go ---------------------------------------------------------------------------------------

    async def adopt(self, box: Box) -> Box:
        """Take a box into service with all that has not completed there; the agent hears of it once it is attached.

        A box that is in service already stays as it is, and is returned.
        """
        if (known := self._boxes.find(box.id)) is not None:
            return known
        for row in await self._store.read(lambda c: rows.unfinished(c, box.id)):
            self._register(box, LiveExecution(row))
            if row.shell_name is not None:
                box.shell(row.shell_name).queue.append(box.running[row.id])
            else:
                self._tasks.start(self._tell(box, box.running[row.id]), f"start of {row.id}")
        self._boxes.add(box)
        for shell in box.shells.values():
            self._work(box, shell)
        return box

    async def attach(self, box: Box, socket: Path, on_lost: Callable[[], None]) -> None:
        """Connect to a box's agent. `on_lost` is called when the connection breaks later.

        Raises AgentError or OSError when there is none to be had.
        """
        await box.disconnect()
        agent = await AgentClient.connect(
            socket, on_exit=partial(self._on_exit, box), on_stall=partial(_stalled, box), on_closed=box.lost
        )
        try:
            entries = await _settled(agent)
            if agent.closed:  # after its last answer: the box was not told, for it did not use it yet
                raise AgentClosedError("cannot reach the devbox's agent: it went away")
            box.attach(agent, entries, on_lost)
        except BaseException:
            await agent.close()
            raise

    def box(self, box_id: str) -> Box | None:
        """The box, when it is in service."""
        return self._boxes.find(box_id)

    async def detach(self, box_id: str, why: str) -> None:
        """The box is gone: every execution that had not completed ends now, with what it wrote."""
        box = self._boxes.find(box_id)
        if box is None:
            return
        await box.end(why)
        while box.running:
            for running in list(box.running.values()):
                if running.committed:
                    await self._complete(box, running, _KILLED, error=why)
                else:
                    await running.done.wait()  # whoever commits it sees that the box is gone
        self._boxes.remove(box)
        self._journals.rations.forget(box_id)
        await asyncio.to_thread(self._journals.trim, box_id)

    async def measure(self, box_ids: Sequence[str]) -> list[str]:
        """Look what journals take of the disk; the devboxes of which they take more than an honest agent lets them."""
        rations = self._journals.rations
        before = {box_id: rations.taken(box_id) for box_id in box_ids}
        found = await asyncio.to_thread(lambda: [(box_id, *self._journals.measure(box_id)) for box_id in box_ids])
        for box_id, taken, _ in found:
            if self._boxes.find(box_id) is not None:
                rations.measured(box_id, before[box_id], taken)
        return [box_id for box_id, _, overrun in found if overrun]

    async def close(self) -> None:
        """Stop all background work; boxes and their commands go on without the server."""
        await self._tasks.close()
        for box in self._boxes.all():
            await box.disconnect()

    async def remove(self, devbox_id: str) -> None:
        """Forget the executions and journals of a devbox that has ended."""
        while await self._store.write(lambda c: rows.remove(c, devbox_id)):
            pass
        await asyncio.to_thread(self._journals.remove, devbox_id)

    def _register(self, box: Box, running: LiveExecution) -> None:
        box.running[running.row.id] = running
        self._running += 1

    def _forget(self, box: Box, running: LiveExecution) -> None:
        if box.running.pop(running.row.id, None) is not None:
            self._running -= 1

    # -- starting ------------------------------------------------------------------------------------------------

    async def start(
        self,
        box_id: str,
        command: str,
        *,
        handle: str | None = None,
        shell_name: str | None = None,
        attach_stdin: bool = False,
        purpose: str = "user",
        once: Once | None = None,
        answers: bool = False,
    ) -> Execution:
        """Start a command and return its row once it is committed and, outside of shells, the agent was told.

        An agent that stays silent is not waited for without end: it is told later.

        A `handle` that the box knows gives the execution that has it (409 when its command is another). `answers`:
        the view of the new execution is the whole answer of the request, so it is stored with the row.
        """
        if once is not None and once.ref is not None:
            return await self._looking.by_id(once.ref)
        _check(command, handle if purpose == "user" else None, shell_name)
        if handle is not None and (known := await self._known(box_id, handle, command)) is not None:
            return known
        box = await self._boxes.reached(box_id)
        await self._measure(box)
        self._check_room(box, shell_name)
        box.room -= 1
        own_id = new_id("exe")
        row = Execution(
            own_id, box.id, handle or own_id, purpose, command, shell_name, attach_stdin, RUNNING,
            None, None, None, None, False, False, 0, False, now_ms(), None,
        )  # fmt: skip
        running = LiveExecution(row, committed=False)
        self._register(box, running)
        begin = (
            self._begin(box, running, once, answers)
            if shell_name is None
            else self._queue(box, box.shell(shell_name), running, once, answers)
        )
        try:
            return await self._tasks.finish(begin, f"start of {own_id}", _ANSWER_S)
        except TimeoutError:
            if not running.committed:
                raise StoreError("cannot start the command yet: the store takes too long; try again") from None
            return running.row
        except TakenError:
            if handle is None or (known := await self._known(box_id, handle, command)) is None:
                raise
            return known

    async def _begin(self, box: Box, running: LiveExecution, once: Once | None, answers: bool) -> Execution:
        """Commit and tell. A task of its own: a caller that gives up leaves nothing half done."""
        if await self._commit(box, running, once, answers):
            await self._tell(box, running)
        return running.row

    async def _queue(
        self, box: Box, shell: Shell, running: LiveExecution, once: Once | None, answers: bool
    ) -> Execution:
        async with shell.order:
            running.row = msgspec.structs.replace(running.row, status=QUEUED if shell.busy else RUNNING)
            if await self._commit(box, running, once, answers):
                shell.queue.append(running)
                self._work(box, shell)
        return running.row

    async def _commit(self, box: Box, running: LiveExecution, once: Once | None, answers: bool) -> bool:
        """Make the journals and write the row; whether the command may run. When it raises, nothing is left."""
        row = running.row
        answer = msgspec.json.encode(view_of(row, "", "", False, False)) if answers else None

        def insert(connection: Connection) -> None:
            rows.add(connection, row)
            if once is not None:
                once.bind(connection, row.id, answer)

        try:
            self._journals.make(box.id, row.id)
            await self._store.write(insert, synced=False)
        except Exception as error:
            self._journals.discard(box.id, row.id)
            self._forget(box, running)
            running.ended()
            if isinstance(error, OSError):
                raise StoreError(
                    f"cannot start the command: its output cannot be kept ({error.strerror}); look after the disk "
                    "of the server's state, then try again"
                ) from error
            raise
        running.committed = True
        self._started += 1
        self._boxes.wake(box.id)
        if box.gone is not None:
            await self._complete(box, running, _KILLED, error=box.gone)
        return box.gone is None

    def _check_room(self, box: Box, shell_name: str | None) -> None:
        if len(box.running) >= self._per_box:
            raise ApiError(
                429, f"cannot start another command in {box.id}: {self._per_box} run there, the limit; wait for some"
            )
        if self._running >= self._in_all:
            raise ApiError(
                429,
                f"cannot start another command: {self._in_all} run on this server, the limit that follows from "
                "its number of open files (LimitNOFILE)",
            )
        if box.room < 1:
            raise ApiError(
                429,
                f"cannot start another command in {box.id}: what earlier ones left running holds the output of as many "
                "as its agent can serve, the limit; end some of those processes",
            )
        if shell_name is not None and not box.has_place(shell_name):
            raise ApiError(
                429,
                f"cannot use another named shell in {box.id}: {SHELLS_MAX} of them run a command, the limit; wait for "
                "one of them",
            )

    async def _measure(self, box: Box) -> None:
        """Ask the agent for how many commands it has room, when that may be none."""
        if box.room > 0:
            return
        try:
            room = await box.agent.room()
        except (AgentError, AgentClosedError) as error:
            raise unreachable(box.id) from error
        box.room = room - sum(not running.told.is_set() for running in box.running.values())

    async def _known(self, box_id: str, handle: str, command: str) -> Execution | None:
        row = await self._store.read(lambda c: rows.by_handle(c, box_id, handle))
        if row is not None and row.command != command:
            raise conflict(
                f"cannot use the command_id {handle} again: it belongs to another command; make a new one for each"
            )
        return row

    # -- telling the agent ---------------------------------------------------------------------------------------

    async def _tell(self, box: Box, running: LiveExecution) -> None:
        """Hand a command to the agent, however often the connection breaks. One that cannot start completes."""
        row = running.row
        while running.row.status != COMPLETED and (agent := await box.reach()) is not None:
            if running.killed:
                await self._complete(box, running, _TERMINATED, error="it was killed before it began")
                return
            try:
                if row.id not in box.known:
                    await self._hand_over(box, agent, row)
            except AgentClosedError:
                box.lost(agent)  # whether the agent took it is known when it is connected again
                continue
            except (AgentError, OSError) as error:
                if not (isinstance(error, AgentError) and error.stage is Stage.DUPLICATE):
                    await self._cannot_start(box, running, error)
                    return
            running.told.set()
            await self.stdin.tell(agent, running)
            return

    async def _hand_over(self, box: Box, agent: AgentClient, row: Execution) -> None:
        with self._journals.opened(box.id, row.id, row.attach_stdin) as (out, err, stdin):
            if row.shell_name is not None:
                await self._run_in_shell(box, agent, box.shell(row.shell_name), row, (out, err, stdin))
                return
            text = command_script(row.command.encode())
            cap = self._journals.rations.promise(box.id, row.id)

            async def spawn(record: bytes) -> None:
                await agent.spawn(row.id, record, out, err, stdin, cap)

            await begin(box, READ_SCRIPT, text, spawn, root=row.purpose == SETUP)

    async def _cannot_start(self, box: Box, running: LiveExecution, error: AgentError | OSError) -> None:
        missing = isinstance(error, AgentError) and error.errno == errno.ENOENT
        why = f"{error}\n" if isinstance(error, AgentError) else f"cannot start the command: {error}\n"
        try:
            self._journals.append(box.id, running.row.id, "stderr", why.encode())
        except OSError as full:
            _log.error("cannot write a journal", execution=running.row.id, error=str(full))
        await self._complete(box, running, 127 if missing else 126, error=why.strip())

    # -- ending --------------------------------------------------------------------------------------------------

    def _on_exit(self, box: Box, event: ExitEvent) -> None:
        """An end that the agent tells; it is told again until it is acknowledged."""
        self._tasks.start(self._exited(box, event), f"end of {event.key}")

    async def _exited(self, box: Box, event: ExitEvent) -> None:
        box.bashes.pop(event.key, None)
        if (running := box.running.get(event.key)) is not None:
            if event.shell_died and running.row.shell_name is not None:
                shell = box.shell(running.row.shell_name)
                box.bashes.pop(shell.key, None)
                shell.failed = event.status == FAILED_BASH
                event = self._explained(box, event)
            await self._complete(box, running, event.status, event=event)
        else:  # its end was stored by a server that died before it could say so
            self._journals.remove_spool(box.id, event.key)
        if (agent := await box.reach()) is None:
            return
        try:
            await agent.ack(event.key)
        except (AgentError, AgentClosedError) as error:
            _log.debug("an end was not acknowledged", key=event.key, error=str(error))
        box.gone_from(event.key)

    def _explained(self, box: Box, event: ExitEvent) -> ExitEvent:
        """The end of a command whose bash failed without a word: why that may be is put on its stderr."""
        words = _NO_WORD.get(event.status)
        if words is None or event.stdout_length or event.stderr_length:
            return event
        try:
            self._journals.append(box.id, event.key, "stderr", words)
        except OSError as full:
            _log.error("cannot write a journal", execution=event.key, error=str(full))
            return event
        return dataclasses.replace(event, stderr_length=len(words))

    async def _complete(
        self, box: Box, running: LiveExecution, status: int, *, error: str | None = None, event: ExitEvent | None = None
    ) -> None:
        """Store the end of an execution and tell everybody; the first that calls decides which end it is."""
        if running.ending:
            await running.done.wait()
            return
        running.ending = True
        done = self._ended(running.row, status, error, event)
        await self._persist(partial(_write_end, done))
        self._forget(box, running)
        self._journals.rations.keep(box.id, done.id, (done.stdout_length or 0) + (done.stderr_length or 0))
        running.changed(done)
        running.ended()
        self._completed += 1
        self._boxes.wake(box.id)
        await self.stdin.remove(running)

    async def _persist(self, change: Callable[[Connection], None]) -> None:
        """Write what must be written; a store that refuses (its disk is full) is tried until it can."""
        await retry_until_stored(lambda: self._store.write(change, synced=False), "an execution")

    def _ended(self, row: Execution, status: int, error: str | None, event: ExitEvent | None) -> Execution:
        out = self._journals.length(row.devbox_id, row.id, "stdout")
        err = self._journals.length(row.devbox_id, row.id, "stderr")
        return msgspec.structs.replace(
            row,
            status=COMPLETED,
            exit_status=status,
            error=error,
            stdout_length=min(out, event.stdout_length) if event else out,
            stderr_length=min(err, event.stderr_length) if event else err,
            stdout_truncated=event.stdout_truncated if event else False,
            stderr_truncated=event.stderr_truncated if event else False,
            end_time_ms=now_ms(),
        )

    # -- named shells --------------------------------------------------------------------------------------------

    def _work(self, box: Box, shell: Shell) -> None:
        if shell.worker is None or shell.worker.done():
            shell.worker = self._tasks.start(self._run_queue(box, shell), f"shell of {box.id}")

    async def _run_queue(self, box: Box, shell: Shell) -> None:
        """Let the commands of a shell run, one after the other."""
        while shell.queue:
            running = shell.queue[0]
            if running.row.status == QUEUED and box.gone is None and not running.killed:
                await self._persist(partial(_write_running, running.row.id))
                if running.row.status == QUEUED:
                    running.changed(msgspec.structs.replace(running.row, status=RUNNING))
            await self._tell(box, running)
            await running.done.wait()
            shell.queue.popleft()

    async def _run_in_shell(
        self, box: Box, agent: AgentClient, shell: Shell, row: Execution, files: tuple[int, int, int | None]
    ) -> None:
        """Give a command to the living bash, or to a new one that starts from the last record."""
        for _ in range(_BEGINNINGS_OF_SHELLS):
            if shell.key not in box.bashes:
                await self._begin_shell(box, agent, shell)
            box.bashes[shell.key] = box.bashes.pop(shell.key)  # the one used last
            command, cap = row.command.encode(), self._journals.rations.promise(box.id, row.id)
            try:
                return await patient(partial(agent.run, shell.key, row.id, command, *files, cap))
            except AgentError as error:
                if error.stage is not Stage.LOOKUP:
                    raise
                box.bashes.pop(shell.key, None)
        words = (
            f"bash ended {_BEGINNINGS_OF_SHELLS} times before it could read the command; see what the profile does, "
            "and what a command without shell_name says"
        )
        raise AgentError(Stage.EXEC, errno.ECHILD, words)

    async def _begin_shell(self, box: Box, agent: AgentClient, shell: Shell) -> None:
        await box.left(shell.key)
        while len(box.bashes) >= SHELLS_MAX and (idle := box.idle()) is not None:
            await self._retire(box, agent, idle)
        with contextlib.suppress(AgentError):
            await agent.ack(shell.key)  # the end of an earlier bash, if there is one, would hold the key
        try:
            script = shell_script(shell.key, self.records.find(box.id, shell.key))
            said = (_BEGUN_ANEW,) if shell.failed else ()
            await begin(box, READ_DRIVER, script, partial(agent.shell, shell.key), root=False, said=said)
            shell.failed = False
        except AgentError as error:
            if error.stage is not Stage.DUPLICATE:
                raise
        box.bashes[shell.key] = None

    async def _retire(self, box: Box, agent: AgentClient, key: str) -> None:
        """End an idle bash, whose next command will begin from its record. Its background jobs go on."""
        box.leave(key)
        try:
            await agent.signal(key, _SIGKILL, Scope.PROCESS)
        except AgentError:
            box.gone_from(key)  # it has ended already
        await box.left(key)

    # -- signals -------------------------------------------------------------------------------------------------

    async def kill(self, row: Execution, group: bool) -> None:
        """End a command: SIGTERM, after a grace SIGKILL, to which the agent sees alone.

        One that has not begun never does; an ended one stays. Raises 503 while the devbox's agent cannot be asked.
        """
        running = self._boxes.running(row)
        if running is None:
            return
        running.killed = True
        box = await self._boxes.reached(row.devbox_id)
        shell = box.shells.get(row.shell_name) if row.shell_name is not None else None
        if shell is not None and shell.drop(running):
            await self._complete(box, running, _TERMINATED, error="it was killed before it began")
            return
        await wait(running.told, KILL_GRACE_S)
        try:
            scope = Scope.GROUP if group else Scope.PROCESS
            await patient(partial(box.agent.end, row.id, scope, KILL_GRACE_S))
        except AgentClosedError as error:
            raise unreachable(box.id) from error
        except AgentError as error:
            if error.stage is not Stage.LOOKUP:  # else it has ended, or never began
                raise ApiError(503, f"cannot kill {row.id} at the moment: {error}; try again", retry=True) from error
        await wait(running.done, 2 * KILL_GRACE_S)


def _check(command: str, handle: str | None, shell_name: str | None) -> None:
    if not command.strip():
        raise bad_request("cannot run an empty command: give `command` a text")
    if "\0" in command:
        raise bad_request("cannot run a command with a NUL character: no shell can be given one; remove it")
    if handle is not None and not _HANDLE.fullmatch(handle):
        raise bad_request(
            f"cannot use {handle[:64]!r} as command_id: 1 to 128 letters, digits, '-' or '_', such as a UUID"
        )
    if shell_name is not None and (not shell_name or len(shell_name) > 256 or "\0" in shell_name):
        raise bad_request("cannot use this shell_name: it has 1 to 256 characters, none of them NUL")


async def _settled(agent: AgentClient) -> list[Entry]:
    """What the agent knows, once it knows of each whether it could start: nobody would hear of a late failure."""
    pause = _STARTING_S
    while True:
        entries = await agent.list()
        if all(entry.state is not EntryState.STARTING for entry in entries):
            return entries
        await asyncio.sleep(pause)  # the agent does not tell by itself
        pause = min(2 * pause, _STARTING_MAX_S)


def _write_end(done: Execution, connection: Connection) -> None:
    rows.complete(connection, done)


def _write_running(execution_id: str, connection: Connection) -> None:
    rows.set_running(connection, execution_id)


def _stalled(box: Box, key: str, number: int) -> None:
    if not box.may_complain():
        return
    if number:
        _log.error("a journal cannot be written; its command waits", devbox=box.id, key=key, error=os.strerror(number))
    else:
        _log.info("a journal is written again", devbox=box.id, key=key)
