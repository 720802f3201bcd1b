"""What a devbox has used, worked out from the times of its states alone: so restarts of the server change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import msgspec

from devboxd.devboxes.states import Status
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import GIB, StateTransition, resources
from devboxd.engine.base import Figures


class DevboxUsageView(msgspec.Struct, frozen=True):
    """Sums over the life of a devbox. Its processor and memory count while it is not suspended, its disk always.

    `live` is what it uses at this moment, null unless it lives. `awake` names what kept a devbox with an idle policy
    from being idle when it was last looked at; nothing when it was idle.
    """

    id: str
    """The devbox. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`"""
    status: str
    """Its status. Example: `"running"`"""
    start_time_ms: int
    """When it was created, in Unix milliseconds. Example: `1764352800000`"""
    end_time_ms: int | None
    """When it ended, in Unix milliseconds; null before. Example: `null`"""
    total_active_seconds: int
    """Seconds in which it was not suspended. Example: `3600`"""
    total_elapsed_seconds: int
    """Seconds since it was created, until it ended. Example: `7200`"""
    vcpu_seconds: int
    """Its cores times the active seconds. Example: `3600`"""
    memory_gb_seconds: int
    """GiB of its memory times the active seconds. Example: `7200`"""
    disk_gb_seconds: int
    """GiB of its disk times the elapsed seconds. Example: `28800`"""
    live: Figures | None = None
    """What it uses at this moment; null unless it lives."""
    awake: tuple[str, ...] = ()
    """What kept it from being idle when the server looked last, in words. Example: `["1 running command"]`"""


def used(devbox: Devbox, now: int, live: Figures | None = None, awake: tuple[str, ...] = ()) -> DevboxUsageView:
    """The usage of a devbox until its end, or until `now` (milliseconds)."""
    end = now if devbox.end_time_ms is None else devbox.end_time_ms
    active, elapsed = (time_ms // 1000 for time_ms in spans(devbox.transitions, end))
    size = resources(devbox.launch_parameters)
    return DevboxUsageView(
        id=devbox.id,
        status=devbox.status,
        start_time_ms=devbox.create_time_ms,
        end_time_ms=devbox.end_time_ms,
        total_active_seconds=active,
        total_elapsed_seconds=elapsed,
        vcpu_seconds=int(active * size.cpu_cores),
        memory_gb_seconds=active * size.memory_bytes // GIB,
        disk_gb_seconds=elapsed * size.disk_bytes // GIB,
        live=live,
        awake=awake,
    )


def spans(transitions: Sequence[StateTransition], end: int) -> tuple[int, int]:
    """How long a devbox was not suspended, and how long it was there, in milliseconds until `end`.

    The clock of the machine may have been set back in between: no span is negative, and none exceeds the whole.
    """
    times = [transition.transition_time_ms for transition in transitions]
    elapsed = max(0, end - times[0])
    suspended = sum(
        max(0, until - begun)
        for transition, (begun, until) in zip(transitions, pairwise([*times, end]), strict=True)
        if transition.status == Status.SUSPENDED
    )
    return max(0, elapsed - suspended), elapsed
