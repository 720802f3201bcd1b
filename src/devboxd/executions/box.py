"""Boxes in service, and the executions in them that have not completed: the server's memory of what runs."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from devboxd.agent.client import AgentClient, AgentError
from devboxd.agent.protocol import Entry, EntryState, EntryType, Stage
from devboxd.concurrency.clock import Clock
from devboxd.concurrency.waits import wait
from devboxd.errors import ApiError
from devboxd.executions.live import LiveExecution
from devboxd.executions.shells import SHELLS_MAX, Shell, shell_key
from devboxd.executions.store import Execution

_T = TypeVar("_T")
_AGAIN_S = 0.05
_PATIENCE_S = 5.0
"""How long a request waits for an agent that is being connected, before it is told to come again."""
_COMPLAINTS = 10
_COMPLAINTS_S = 1.0


@dataclass(eq=False)
class Box:
    """A devbox in which commands can run: its agent, who runs them, and with which environment."""

    id: str
    user: str
    environment: Mapping[str, str]
    clock: Clock = field(default_factory=Clock)
    uid: int = 1000
    gone: str | None = None
    """Why nothing runs here any more, once that is so."""
    known: frozenset[str] = frozenset()
    """The keys that the agent knew when it was connected."""
    told: tuple[str, ...] = ()
    """What the box was found to have lost, of which a command has told already."""
    room: int = 0
    """For how many more commands the agent has room at least; below 1 it has to be asked."""
    bashes: dict[str, None] = field(default_factory=dict)
    """The keys of named shells that are thought to live, the one used last at the end."""
    leaving: dict[str, asyncio.Event] = field(default_factory=dict)
    """The keys of idle shells that are being ended; the event comes with the end."""
    running: dict[str, LiveExecution] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    """The connections and transfers that are open at this moment, by kind."""
    touched_ms: int = 0
    """When somebody last asked for something here, in Unix milliseconds."""
    shells: dict[str, Shell] = field(default_factory=dict)
    _agent: AgentClient | None = None
    _attached: asyncio.Event = field(default_factory=asyncio.Event)
    _on_lost: Callable[[], None] = lambda: None
    _complaints: deque[float] = field(default_factory=lambda: deque(maxlen=_COMPLAINTS))

    def touch(self) -> None:
        """Somebody asked for something here just now."""
        self.touched_ms = self.clock.now_ms()

    @contextmanager
    def using(self, kind: str) -> Iterator[None]:
        """Count a connection or transfer as open while the block lasts."""
        self.uses[kind] += 1
        try:
            yield
        finally:
            self.uses[kind] -= 1
            self.touch()

    @property
    def agent(self) -> AgentClient:
        """The connection to the agent, as it was last: requests on a lost one raise AgentClosedError.

        Raises 503 before the first.
        """
        if self._agent is None:
            raise unreachable(self.id)
        return self._agent

    def attach(self, agent: AgentClient, entries: Sequence[Entry], on_lost: Callable[[], None]) -> None:
        """Use this connection, whose agent knows `entries`, from now on; `on_lost` is called once when it breaks."""
        self._agent, self._on_lost = agent, on_lost
        self.known = frozenset(entry.key for entry in entries)
        self.room = 0
        living = {e.key for e in entries if e.type is EntryType.SHELL and e.state is EntryState.RUNNING}
        used = [key for key in self.bashes if key in living]
        self.bashes = dict.fromkeys([*sorted(living.difference(used)), *used])
        for key in list(self.leaving):
            self.gone_from(key)
        self._attached.set()

    def lost(self, agent: AgentClient | None = None) -> None:
        """The connection, or the one named if it is still the present one, is broken."""
        if agent in (None, self._agent) and self._attached.is_set() and self.gone is None:
            self._attached.clear()
            self._on_lost()

    def may_complain(self) -> bool:
        """Whether what the agent tells goes into the log: so many lines in a while, for the box decides about them."""
        now = time.monotonic()
        if len(self._complaints) == _COMPLAINTS and now - self._complaints[0] < _COMPLAINTS_S:
            return False
        self._complaints.append(now)
        return True

    @property
    def attached(self) -> bool:
        """Whether the agent is connected."""
        return self._agent is not None and self._attached.is_set()

    async def disconnect(self) -> None:
        """Close the connection; the box goes on."""
        self._attached.clear()
        if self._agent is not None:
            await self._agent.close()

    async def end(self, why: str) -> None:
        """Nothing runs here any more: whoever waits for the agent learns it, after what the agent told last."""
        if self._agent is not None:
            await self._agent.last_words()
        self.gone = why
        self._attached.set()
        if self._agent is not None:
            await self._agent.close()

    async def reach(self) -> AgentClient | None:
        """The connected agent, however long that takes; None when the box has ended."""
        await self._attached.wait()
        return None if self.gone is not None else self.agent

    async def reached(self) -> bool:
        """Whether the agent is connected, now or within a time for which a request can wait."""
        return (self._attached.is_set() or await wait(self._attached, _PATIENCE_S)) and self.gone is None

    def _busy(self) -> set[str]:
        return {shell.key for shell in self.shells.values() if shell.busy}

    def has_place(self, shell_name: str) -> bool:
        """Whether a command for this named shell can be taken: the number of those that have one is bounded."""
        busy = self._busy()
        return len(busy) < SHELLS_MAX or shell_key(shell_name) in busy

    def idle(self) -> str | None:
        """The key of the living shell without a command that was used least recently."""
        busy = self._busy()
        return next((key for key in self.bashes if key not in busy), None)

    def leave(self, key: str) -> None:
        """An idle shell is being ended: no command is given to it any more."""
        del self.bashes[key]
        self.leaving[key] = asyncio.Event()

    def gone_from(self, key: str) -> None:
        """A shell that was being ended is gone; its key is free."""
        if (event := self.leaving.pop(key, None)) is not None:
            event.set()

    async def left(self, key: str) -> None:
        """Wait until a shell that is being ended is gone."""
        if (event := self.leaving.get(key)) is not None:
            await wait(event, _PATIENCE_S)

    def shell(self, name: str) -> Shell:
        """The named shell, a new one if there is none yet."""
        return self.shells.setdefault(name, Shell(name))

    def ids_of(self, user: str) -> str:
        """The ids of root or the box's own user, as the create made it, for the agent."""
        return "0:0" if user == "root" else f"{self.uid}:{self.uid}"

    def home_of(self, user: str) -> str:
        """The home of root or the box's own user, as the create made it."""
        return "/root" if user == "root" else f"/home/{user}"


class Boxes:
    """All boxes in service by their ids. A box is in service before its agent is connected, until all has ended."""

    def __init__(self) -> None:
        self._boxes: dict[str, Box] = {}
        self._wakes: dict[str, set[asyncio.Event]] = {}

    def add(self, box: Box) -> None:
        """Take a box into service."""
        self._boxes[box.id] = box

    def remove(self, box: Box) -> None:
        """Take a box out of service."""
        self._boxes.pop(box.id, None)

    def all(self) -> list[Box]:
        """Every box in service."""
        return list(self._boxes.values())

    def find(self, box_id: str) -> Box | None:
        """The box, when it is in service."""
        return self._boxes.get(box_id)

    @contextlib.contextmanager
    def watching(self, box_id: str, event: asyncio.Event) -> Iterator[None]:
        """Set `event` whenever an execution is begun or has ended in the box, whether it is in service or not."""
        waiting = self._wakes.setdefault(box_id, set())
        waiting.add(event)
        try:
            yield
        finally:
            waiting.discard(event)
            if not waiting:
                self._wakes.pop(box_id, None)

    def wake(self, box_id: str) -> None:
        """An execution was begun, or has ended."""
        for event in self._wakes.get(box_id, ()):
            event.set()

    async def reached(self, box_id: str) -> Box:
        """The box with its agent connected. Raises 503 when that takes longer than a request can wait."""
        box = self._boxes.get(box_id)
        if box is None or not await box.reached():
            raise unreachable(box_id)
        return box

    def running(self, row: Execution) -> LiveExecution | None:
        """What is known of an execution that has not completed."""
        box = self._boxes.get(row.devbox_id)
        return None if box is None else box.running.get(row.id)


async def patient(ask: Callable[[], Awaitable[_T]]) -> _T:
    """Ask an agent, and for a while again while it has no child or place to spare. Raises what `ask` raises."""
    for _ in range(round(_PATIENCE_S / _AGAIN_S)):
        try:
            return await ask()
        except AgentError as error:
            if (error.stage, error.errno) != (Stage.BUSY, errno.EAGAIN):
                raise
        await asyncio.sleep(_AGAIN_S)  # the agent does not tell when it has
    return await ask()


async def as_user(box: Box, user: str, path: str, ask: Callable[[str, str], Awaitable[_T]]) -> _T:
    """Ask the agent for a file as a user, and by the ids of the create where /etc/passwd does not know that user.

    While that is so, root does what the user may not: so the file can be put back. Raises AgentError.
    """
    try:
        return await ask(user, path)
    except AgentError as error:
        if error.stage is not Stage.USER or error.errno != errno.ENOENT:
            raise
    place = path if path.startswith("/") else f"{box.home_of(user)}/{path.removeprefix('~').removeprefix('/')}"
    try:
        return await ask(box.ids_of(user), place)
    except AgentError as error:
        if error.errno not in (errno.EACCES, errno.EPERM):
            raise
    return await ask("0:0", place)


def unreachable(box_id: str) -> ApiError:
    """503: clients come again, and the box is reached then."""
    return ApiError(503, f"cannot reach {box_id} at the moment: its agent is being connected; try again", retry=True)
