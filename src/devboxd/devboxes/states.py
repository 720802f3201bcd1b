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
    FAILED = "failed"
    BOX_ENDED = "box_ended"
    ENTRYPOINT_ENDED = "entrypoint_ended"
    DEADLINE_PASSED = "deadline_passed"
    SHUTDOWN_ASKED = "shutdown_asked"
    SUSPEND_ASKED = "suspend_asked"
    RESUME_ASKED = "resume_asked"
    KEEP_ALIVE_ASKED = "keep_alive_asked"
    USE_ASKED = "use_asked"


class Effect(StrEnum):
    """What has to be done after a transition."""

    PREPARE = "prepare"
    START_ENTRYPOINT = "start_entrypoint"
    RESET_DEADLINE = "reset_deadline"
    FREE = "free"


@dataclass(frozen=True)
class Move:
    """A legal pair: the next status (the same one where nothing changes), the effects, the reason of an end."""

    status: Status
    effects: tuple[Effect, ...] = ()
    shutdown_reason: str | None = None


@dataclass(frozen=True)
class Refusal:
    """An illegal pair that a request can ask for: the code of HTTP and what to tell the caller."""

    code: int
    advice: str


class InvalidTransition(Exception):
    """An event that the server itself may not raise in this status: a fault of the server, told with its story."""

    def __init__(self, status: Status, event: Event) -> None:
        super().__init__(f"the event {event} is not possible while a devbox is {status}")
        self.status = status
        self.event = event


P, I, R, Z, F, S = Status  # noqa: E741
_ENDED = "it has ended; create another devbox"
_NOT_YET = "wait for the status running"
_ASLEEP = "it is suspended"


def _end(reason: str) -> dict[Status, Move | Refusal]:
    move = Move(S, (Effect.FREE,), reason)
    return {P: move, I: move, R: move, Z: move, F: Move(F), S: Move(S)}


def _fail() -> dict[Status, Move | Refusal]:
    move = Move(F, (Effect.FREE,))
    return {P: move, I: move, R: move, F: Move(F), S: Move(S)}


_UNCHANGED: dict[Status, Move | Refusal] = {F: Move(F), S: Move(S)}
_NO_SUSPEND = Refusal(400, "this version keeps no disks of suspended devboxes; shut it down instead")

TABLE: Mapping[Event, Mapping[Status, Move | Refusal]] = {
    Event.BOOTED: {P: Move(I, (Effect.PREPARE,)), **_UNCHANGED},
    Event.PREPARED: {I: Move(R, (Effect.START_ENTRYPOINT,)), **_UNCHANGED},
    Event.FAILED: _fail(),
    Event.BOX_ENDED: _fail(),
    Event.ENTRYPOINT_ENDED: {R: Move(S, (Effect.FREE,), "entrypoint_exit"), **_UNCHANGED},
    Event.DEADLINE_PASSED: _end("keep_alive_timeout"),
    Event.SHUTDOWN_ASKED: _end("api_shutdown"),
    Event.SUSPEND_ASKED: {
        P: Refusal(400, _NOT_YET),
        I: Refusal(400, _NOT_YET),
        R: _NO_SUSPEND,
        Z: Refusal(400, _ASLEEP),
        F: Refusal(400, _ENDED),
        S: Refusal(400, _ENDED),
    },
    Event.RESUME_ASKED: {
        P: Refusal(400, "it is not suspended"),
        I: Refusal(400, "it is not suspended"),
        R: Refusal(400, "it is not suspended"),
        Z: _NO_SUSPEND,
        F: Refusal(400, _ENDED),
        S: Refusal(400, _ENDED),
    },
    Event.KEEP_ALIVE_ASKED: {
        P: Move(P, (Effect.RESET_DEADLINE,)),
        I: Move(I, (Effect.RESET_DEADLINE,)),
        R: Move(R, (Effect.RESET_DEADLINE,)),
        Z: Move(Z, (Effect.RESET_DEADLINE,)),
        F: Refusal(400, _ENDED),
        S: Refusal(400, _ENDED),
    },
    Event.USE_ASKED: {
        P: Refusal(400, _NOT_YET),
        I: Refusal(400, _NOT_YET),
        R: Move(R),
        Z: Refusal(400, _ASLEEP),
        F: Refusal(400, _ENDED),
        S: Refusal(400, _ENDED),
    },
}
"""The whole table. A pair that is absent raises InvalidTransition: no part of the server may bring it about."""


def step(status: Status, event: Event) -> Move | Refusal:
    """What `event` means for a devbox in `status`; pure. Raises InvalidTransition for a pair outside the table."""
    try:
        return TABLE[event][status]
    except KeyError:
        raise InvalidTransition(status, event) from None
