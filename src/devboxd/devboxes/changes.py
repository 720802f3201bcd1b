"""What is remembered of a devbox that lives, and the one way in which it changes: an event, committed, then told."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import msgspec
import structlog
from prometheus_client.metrics_core import Metric
from sqlalchemy import Connection

from devboxd.concurrency.clock import Clock
from devboxd.devboxes import store as rows
from devboxd.devboxes.states import LIVE, SHUTDOWN_REASONS, TERMINAL, Effect, Event, Refusal, Status, Transition, step
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import DEFAULT_LIFE_S, LaunchParameters, StateTransition, idle_policy
from devboxd.errors import ApiError
from devboxd.http.once import Once
from devboxd.metrics import counter
from devboxd.store.db import Store
from devboxd.store.retry import retry_until_stored

_log = structlog.get_logger()
_NEVER_MS = 1 << 60
_TOLD = 5
"""So many of its last statuses a fault names."""
_LOST_WITH_POWER = frozenset({Event.BOOTED, Event.PREPARED, Event.READY})
"""What a power failure takes away together with the box itself; so storing it need not wait for the disk."""

_VERBS = {"shutdown_during_snapshot": "shut down", "thawed": "resume"}
"""What was asked for, where the event has another name."""


FailureReason = Literal["execution_failed", "health_check_failed", "out_of_disk", "out_of_memory"]
_ENDS = [
    *((str(Status.SHUTDOWN), reason) for reason in SHUTDOWN_REASONS),
    *((str(Status.FAILURE), reason) for reason in get_args(FailureReason)),
]


class BoxFailure(Exception):
    """A devbox cannot go on: the reason's name on the wire, and in words."""

    def __init__(self, reason: FailureReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


@dataclass
class Life:
    """A devbox that has not been freed, and those who wait for it."""

    devbox: Devbox
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    memory: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by whoever thaws its processes or ends them."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    wakes: set[asyncio.Event] = field(default_factory=set)
    image: str | None = None
    """The name of the image of which its box was made, until that is stored."""
    supervisor: asyncio.Task[None] | None = None
    frozen: bool = False
    """It is suspended and its processes are still there."""
    awake: tuple[str, ...] = ()
    """What kept it awake when it was last looked at."""
    snapshots: set[str] = field(default_factory=set)
    """The snapshots that are being taken of it."""

    @property
    def resuming(self) -> bool:
        """Whether it slept before and is being made again: if that fails it sleeps on."""
        return self.devbox.boots > 0 and self.devbox.status in LIVE - {Status.RUNNING}

    def update(self, devbox: Devbox) -> None:
        """Take the new record and wake everybody who waits for a change."""
        self.devbox = devbox
        self.changed.set()
        for event in self.wakes:
            event.set()


class Changes:
    """Applies events to devboxes. One at a time for each of them."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self.clock = clock
        """By which devboxes live."""
        self._ended: Counter[tuple[str, ...]] = Counter(dict.fromkeys(_ENDS, 0))
        self._suspended = 0
        self._resumed = 0

    def collect(self) -> Iterator[Metric]:
        """The metrics of what happened to devboxes since the server was started."""
        yield counter("devboxd_devboxes_ended", "Devboxes that ended, and why", self._ended, "status", "reason")
        yield counter("devboxd_suspends", "Devboxes put to sleep", {(): self._suspended})
        yield counter("devboxd_resumes", "Devboxes that slept and run again", {(): self._resumed})

    async def apply(
        self, life: Life, event: Event, failure: BoxFailure | None = None, once: Once | None = None, **more: Any
    ) -> None:
        """Let an event happen, with more columns to be written. Raises the refusal of the table, and StoreError.

        The request that asked for it, `once`, is bound to the change, and the view after it is its answer.
        """
        async with life.lock:
            devbox = life.devbox
            transition = step(devbox.status, event, [passed.status for passed in devbox.transitions[-_TOLD:]])
            if isinstance(transition, Refusal):
                raise refused(devbox, event.removesuffix("_asked"), transition)
            now = self.clock.now_ms()
            values: dict[str, Any] = more if transition.status != devbox.status else {}
            for effect in transition.effects:
                values |= _WRITTEN[effect](devbox, now)
            if transition.status != devbox.status:
                text = failure.text if failure else None
                values["status"] = transition.status
                passed = [] if transition.through is None else [StateTransition(transition.through, now)]
                values["transitions"] = [*devbox.transitions, *passed, StateTransition(transition.status, now, text)]
                values["prepared"] = devbox.prepared or transition.status == Status.RUNNING
                values["idle_since_ms"] = None
                if transition.status in TERMINAL:
                    values["end_time_ms"] = now
                    values["shutdown_reason"] = transition.shutdown_reason
                    values["failure_reason"] = failure.reason if failure else None
            if values:
                change = partial(changed, devbox=devbox, once=once, **values)
                life.update(await self._store.write(change, synced=event not in _LOST_WITH_POWER))
                if transition.status != devbox.status:
                    self._count(devbox, event, transition, failure)
                _log.info("devbox", id=devbox.id, was=devbox.status, status=transition.status, by=event)

    def _count(self, devbox: Devbox, event: Event, transition: Transition, failure: BoxFailure | None) -> None:
        if transition.status in TERMINAL:
            self._ended[transition.status, transition.shutdown_reason or (failure.reason if failure else "")] += 1
        elif event is Event.SUSPENDED:
            self._suspended += 1
        elif transition.status is Status.RUNNING and (devbox.boots > 0 or event is Event.THAWED):
            self._resumed += 1

    async def happen(self, life: Life, event: Event, failure: BoxFailure | None = None, **more: Any) -> None:
        """Apply an event that nobody asked for; a store that cannot be written is tried until it can."""
        await retry_until_stored(lambda: self.apply(life, event, failure, **more), f"{event} of {life.devbox.id}")

    async def note(self, life: Life, **values: Any) -> None:
        """Write columns that nobody waits for; tried until it can be done."""

        async def write() -> None:
            async with life.lock:
                change = partial(rows.change, devbox=life.devbox, **values)
                life.update(await self._store.write(change, synced=False))

        await retry_until_stored(write, f"{', '.join(values)} of {life.devbox.id}")


def changed(connection: Connection, devbox: Devbox, once: Once | None, **values: Any) -> Devbox:
    """Write columns of a devbox; the request that asked for it is bound to that, and the new view is its answer."""
    new = rows.change(connection, devbox, **values)
    if once is not None:
        once.bind(connection, new.id, msgspec.json.encode(new.view()))
    return new


def deadline(launch: LaunchParameters, now: int) -> int:
    """When a devbox that is made, resumed or kept alive now ends; with an idle policy that alone decides."""
    if idle_policy(launch) is not None:
        return _NEVER_MS
    return now + (launch.keep_alive_time_seconds or DEFAULT_LIFE_S) * 1000


def _with_new_deadline(devbox: Devbox, now: int) -> dict[str, Any]:
    return {"deadline_ms": deadline(devbox.launch_parameters, now), "idle_since_ms": None}


def _with_one_boot_more(devbox: Devbox, _: int) -> dict[str, Any]:
    return {"boots": devbox.boots + 1}


_WRITTEN = {Effect.RESET_DEADLINE: _with_new_deadline, Effect.COUNT_BOOT: _with_one_boot_more}
"""The columns of each effect, of a devbox at a time."""


def refused(devbox: Devbox, verb: str, refusal: Refusal) -> ApiError:
    """The answer to a request for what the table refuses."""
    retry = False if refusal.code == 409 else None
    verb = _VERBS.get(verb, verb.replace("_", " "))
    why = f"while its status is {devbox.status}: {refusal.advice}"
    return ApiError(refusal.code, f"cannot {verb} the devbox {devbox.id} {why}", retry=retry)
