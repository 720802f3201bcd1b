"""The states of a devbox as data: (status, event) gives a transition or a refusal, and each status its work.

Nothing here has an effect. `changes.py` writes a transition with its effects; `supervisor.py` does the work of the
status that a devbox has come to, or in which a server found it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """The status of a devbox, as it stands on the wire."""

    PROVISIONING = "provisioning"
    INITIALIZING = "initializing"
    RUNNING = "running"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    FAILURE = "failure"
    SHUTDOWN = "shutdown"


WIRE_STATUSES = frozenset(
    {"scheduled", "queued", "provisioning", "initializing", "running"}
    | {"suspending", "suspended", "resuming", "failure", "shutdown"}
)
"""Every status that a client may name in a filter or a wait, also those that this server never shows."""

TERMINAL = frozenset({Status.FAILURE, Status.SHUTDOWN})
LIVE = frozenset({Status.PROVISIONING, Status.INITIALIZING, Status.RUNNING})


class Event(StrEnum):
    """What can happen to a devbox."""

    BOOTED = "booted"
    PREPARED = "prepared"
    READY = "ready"
    """Booted, where nothing is to be prepared: both in one."""
    FAILED = "failed"
    RESUME_FAILED = "resume_failed"
    BOX_ENDED = "box_ended"
    HOST_STOPS = "host_stops"
    HOST_RESTARTED = "host_restarted"
    DISK_LOST = "disk_lost"
    ENTRYPOINT_ENDED = "entrypoint_ended"
    DEADLINE_PASSED = "deadline_passed"
    IDLE_TO_SHUTDOWN = "idle_to_shutdown"
    IDLE_TO_SUSPEND = "idle_to_suspend"
    SUSPENDED = "suspended"
    THAWED = "thawed"
    SHUTDOWN_ASKED = "shutdown_asked"
    SHUTDOWN_DURING_SNAPSHOT_ASKED = "shutdown_during_snapshot_asked"
    SUSPEND_ASKED = "suspend_asked"
    RESUME_ASKED = "resume_asked"
    SNAPSHOT_ASKED = "snapshot_asked"
    KEEP_ALIVE_ASKED = "keep_alive_asked"
    USE_ASKED = "use_asked"


class Effect(StrEnum):
    """What is written together with the new status."""

    COUNT_BOOT = "count_boot"
    RESET_DEADLINE = "reset_deadline"


class Work(StrEnum):
    """What the supervisor does for a devbox in a status, until an event ends that."""

    BOOT = "boot"
    PREPARE = "prepare"
    RUN_ENTRYPOINT = "run_entrypoint"
    SUSPEND = "suspend"
    STAY_SUSPENDED = "stay_suspended"
    FREE = "free"


WORK: Mapping[Status, Work] = {
    Status.PROVISIONING: Work.BOOT,
    Status.INITIALIZING: Work.PREPARE,
    Status.RUNNING: Work.RUN_ENTRYPOINT,
    Status.SUSPENDING: Work.SUSPEND,
    Status.SUSPENDED: Work.STAY_SUSPENDED,
    Status.FAILURE: Work.FREE,
    Status.SHUTDOWN: Work.FREE,
}
"""The work of each status. A server that finds a devbox in the middle of one goes on with it."""


@dataclass(frozen=True)
class Transition:
    """A legal pair: the next status (the same one where nothing changes), what is written with it, why it ends.

    `through`: a status that it passes without staying there.
    """

    status: Status
    effects: tuple[Effect, ...] = ()
    shutdown_reason: str | None = None
    through: Status | None = None


@dataclass(frozen=True)
class Refusal:
    """An illegal pair that a request can ask for: the code of HTTP, and what to tell a caller who hears the status."""

    code: int
    advice: str


class InvalidTransition(Exception):
    """An event that the server itself may not raise in this status: a fault of the server.

    `history`: the last statuses of the devbox, oldest first.
    """

    def __init__(self, status: Status, event: Event, history: Sequence[str] = ()) -> None:
        before = f" (it was {', '.join(history)})" if history else ""
        super().__init__(f"the event {event} is not possible while a devbox is {status}{before}")
        self.status = status
        self.event = event
        self.history = tuple(history)


P, I, R, U, Z, F, S = Status  # noqa: E741
_ENDED = "it has ended; create another devbox"
_NOT_YET = "wait for the status running"
_UNCHANGED: dict[Status, Transition | Refusal] = {F: Transition(F), S: Transition(S)}
_OVER: dict[Status, Transition | Refusal] = {F: Refusal(400, _ENDED), S: Refusal(400, _ENDED)}
_STARTING = Refusal(400, "it is not suspended; wait for the status running")


def _end(reason: str, *statuses: Status) -> dict[Status, Transition | Refusal]:
    transition = Transition(S, shutdown_reason=reason)
    return {status: transition for status in statuses} | _UNCHANGED


def _fail() -> dict[Status, Transition | Refusal]:
    """A disk that sleeps, or is being put to sleep, is not lost with the processes."""
    transition = Transition(F)
    return {P: transition, I: transition, R: transition, U: Transition(Z), Z: Transition(Z), **_UNCHANGED}


def _only_running(transition: Transition) -> dict[Status, Transition | Refusal]:
    falling, asleep = Refusal(400, "wait for the status suspended, then resume it"), Refusal(400, "resume it first")
    return {P: Refusal(400, _NOT_YET), I: Refusal(400, _NOT_YET), R: transition, U: falling, Z: asleep, **_OVER}


_SUSPEND = Transition(U)
_SNAPSHOT_RUNS = Refusal(409, "a snapshot of it is being taken; wait for that, or use force=true")

TABLE: Mapping[Event, Mapping[Status, Transition | Refusal]] = {
    Event.BOOTED: {P: Transition(I), **_UNCHANGED},
    Event.PREPARED: {I: Transition(R), **_UNCHANGED},
    Event.READY: {P: Transition(R, through=I), **_UNCHANGED},
    Event.FAILED: _fail(),
    Event.RESUME_FAILED: {
        P: Transition(Z),
        I: Transition(Z),
        R: Transition(Z),
        U: Transition(Z),
        Z: Transition(Z),
        **_UNCHANGED,
    },
    Event.BOX_ENDED: _fail(),
    Event.HOST_STOPS: {P: Transition(P), I: _SUSPEND, R: _SUSPEND, U: Transition(U), Z: Transition(Z), **_UNCHANGED},
    Event.HOST_RESTARTED: {I: Transition(Z), R: Transition(Z), U: Transition(Z), Z: Transition(Z), **_UNCHANGED},
    Event.DISK_LOST: {status: Transition(F) for status in (P, I, R, U, Z)} | _UNCHANGED,
    Event.ENTRYPOINT_ENDED: {**_end("entrypoint_exit", R), U: Transition(U), Z: Transition(Z)},
    Event.DEADLINE_PASSED: {**_end("keep_alive_timeout", P, I, R), U: Transition(U), Z: Transition(Z)},
    Event.IDLE_TO_SHUTDOWN: {**_end("idle", R), U: Transition(U), Z: Transition(Z)},
    Event.IDLE_TO_SUSPEND: {R: _SUSPEND, U: Transition(U), Z: Transition(Z), **_UNCHANGED},
    Event.SUSPENDED: {U: Transition(Z), Z: Transition(Z), **_UNCHANGED},
    Event.THAWED: {Z: Transition(R, (Effect.RESET_DEADLINE,)), **_OVER},
    Event.SHUTDOWN_ASKED: _end("api_shutdown", P, I, R, U, Z),
    Event.SHUTDOWN_DURING_SNAPSHOT_ASKED: {status: _SNAPSHOT_RUNS for status in (P, I, R, U, Z)} | _UNCHANGED,
    Event.SUSPEND_ASKED: {
        P: Refusal(400, _NOT_YET),
        I: Refusal(400, _NOT_YET),
        R: _SUSPEND,
        U: Refusal(400, "that is under way; wait for the status suspended"),
        Z: Refusal(400, "it sleeps already; resume it to use it"),
        **_OVER,
    },
    Event.RESUME_ASKED: {
        P: _STARTING,
        I: _STARTING,
        R: Refusal(400, "it is not suspended; use it as it is"),
        U: Refusal(400, "wait for the status suspended"),
        Z: Transition(P, (Effect.RESET_DEADLINE, Effect.COUNT_BOOT)),
        **_OVER,
    },
    Event.SNAPSHOT_ASKED: _only_running(Transition(R)),
    Event.KEEP_ALIVE_ASKED: {status: Transition(status, (Effect.RESET_DEADLINE,)) for status in (P, I, R, U, Z)}
    | _OVER,
    Event.USE_ASKED: _only_running(Transition(R)),
}
"""The whole table. A pair that is absent raises InvalidTransition: no part of the server may bring it about."""


SHUTDOWN_REASONS = sorted(
    {
        transition.shutdown_reason
        for transitions in TABLE.values()
        for transition in transitions.values()
        if isinstance(transition, Transition) and transition.shutdown_reason
    }
)
"""Why devboxes are shut down, by the names on the wire."""


def step(status: Status, event: Event, history: Sequence[str] = ()) -> Transition | Refusal:
    """What `event` means for a devbox in `status`; pure. Raises InvalidTransition for a pair outside the table, with
    its `history`.
    """
    try:
        return TABLE[event][status]
    except KeyError:
        raise InvalidTransition(status, event, history) from None
