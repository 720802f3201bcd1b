"""The states of a devbox as data: (status, event) gives the next status and what has to be done, or a refusal.

Nothing here has an effect. `lifecycle.py` performs the effects, in the order in which they are listed.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """What has to be done after a transition."""

    PREPARE = "prepare"
    START_ENTRYPOINT = "start_entrypoint"
    SUSPEND = "suspend"
    BOOT = "boot"
    RESET_DEADLINE = "reset_deadline"
    FREE = "free"


@dataclass(frozen=True)
class Move:
    """A legal pair: the next status (the same one where nothing changes), the effects, the reason of an end.

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
    """An event that the server itself may not raise in this status: a fault of the server, told with its story."""

    def __init__(self, status: Status, event: Event) -> None:
        super().__init__(f"the event {event} is not possible while a devbox is {status}")
        self.status = status
        self.event = event


P, I, R, U, Z, F, S = Status  # noqa: E741
_ENDED = "it has ended; create another devbox"
_NOT_YET = "wait for the status running"
_UNCHANGED: dict[Status, Move | Refusal] = {F: Move(F), S: Move(S)}
_OVER: dict[Status, Move | Refusal] = {F: Refusal(400, _ENDED), S: Refusal(400, _ENDED)}
_STARTING = Refusal(400, "it is not suspended; wait for the status running")


def _end(reason: str, *statuses: Status) -> dict[Status, Move | Refusal]:
    move = Move(S, (Effect.FREE,), reason)
    return {status: move for status in statuses} | _UNCHANGED


def _fail() -> dict[Status, Move | Refusal]:
    """A disk that sleeps, or is being put to sleep, is not lost with the processes."""
    move = Move(F, (Effect.FREE,))
    return {P: move, I: move, R: move, U: Move(Z), Z: Move(Z), **_UNCHANGED}


def _only_running(move: Move) -> dict[Status, Move | Refusal]:
    falling, asleep = Refusal(400, "wait for the status suspended, then resume it"), Refusal(400, "resume it first")
    return {P: Refusal(400, _NOT_YET), I: Refusal(400, _NOT_YET), R: move, U: falling, Z: asleep, **_OVER}


_SUSPEND = Move(U, (Effect.SUSPEND,))
_SNAPSHOT_RUNS = Refusal(409, "a snapshot of it is being taken; wait for that, or use force=true")

TABLE: Mapping[Event, Mapping[Status, Move | Refusal]] = {
    Event.BOOTED: {P: Move(I, (Effect.PREPARE,)), **_UNCHANGED},
    Event.PREPARED: {I: Move(R, (Effect.START_ENTRYPOINT,)), **_UNCHANGED},
    Event.READY: {P: Move(R, (Effect.START_ENTRYPOINT,), through=I), **_UNCHANGED},
    Event.FAILED: _fail(),
    Event.RESUME_FAILED: {P: Move(Z), I: Move(Z), R: Move(Z), U: Move(Z), Z: Move(Z), **_UNCHANGED},
    Event.BOX_ENDED: _fail(),
    Event.HOST_STOPS: {P: Move(P), I: _SUSPEND, R: _SUSPEND, U: Move(U), Z: Move(Z), **_UNCHANGED},
    Event.HOST_RESTARTED: {I: Move(Z), R: Move(Z), U: Move(Z), Z: Move(Z), **_UNCHANGED},
    Event.DISK_LOST: {status: Move(F, (Effect.FREE,)) for status in (P, I, R, U, Z)} | _UNCHANGED,
    Event.ENTRYPOINT_ENDED: {**_end("entrypoint_exit", R), U: Move(U), Z: Move(Z)},
    Event.DEADLINE_PASSED: {**_end("keep_alive_timeout", P, I, R), U: Move(U), Z: Move(Z)},
    Event.IDLE_TO_SHUTDOWN: {**_end("idle", R), U: Move(U), Z: Move(Z)},
    Event.IDLE_TO_SUSPEND: {R: _SUSPEND, U: Move(U), Z: Move(Z), **_UNCHANGED},
    Event.SUSPENDED: {U: Move(Z), Z: Move(Z), **_UNCHANGED},
    Event.THAWED: {Z: Move(R, (Effect.RESET_DEADLINE,)), **_OVER},
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
        Z: Move(P, (Effect.RESET_DEADLINE, Effect.BOOT)),
        **_OVER,
    },
    Event.SNAPSHOT_ASKED: _only_running(Move(R)),
    Event.KEEP_ALIVE_ASKED: {status: Move(status, (Effect.RESET_DEADLINE,)) for status in (P, I, R, U, Z)} | _OVER,
    Event.USE_ASKED: _only_running(Move(R)),
}
"""The whole table. A pair that is absent raises InvalidTransition: no part of the server may bring it about."""


SHUTDOWN_REASONS = sorted(
    {
        move.shutdown_reason
        for moves in TABLE.values()
        for move in moves.values()
        if isinstance(move, Move) and move.shutdown_reason
    }
)
"""Why devboxes are shut down, by the names on the wire."""


def step(status: Status, event: Event) -> Move | Refusal:
    """What `event` means for a devbox in `status`; pure. Raises InvalidTransition for a pair outside the table."""
    try:
        return TABLE[event][status]
    except KeyError:
        raise InvalidTransition(status, event) from None
