"""Entries of the log of a devbox, made from the rows and journals of its executions and from its own life."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from devboxd.devboxes.incidents import Incident
from devboxd.devboxes.states import Status
from devboxd.devboxes.store import Devbox
from devboxd.executions.journals import Stream
from devboxd.executions.looking import Looking
from devboxd.executions.store import COMMAND_SHOWN, Execution

MAX_ENTRIES = 1000
MAX_BYTES = 1 << 20
"""Most text in all messages of one answer."""
MAX_LINE = 16 * 1024
"""Most bytes of one line: of a longer one its end, so that it leaves room for what others said."""
_LEFT_OUT = "..."
_SOURCES = {"setup": "setup_commands", "launch": "setup_commands", "entrypoint": "entrypoint"}
_LEVELS: dict[Stream, str] = {"stdout": "info", "stderr": "error"}


class LogEntry(msgspec.Struct, frozen=True):
    """A command ("-> ...", with its exit code once it has ended), a line of its output, or an event.

    `timestamp_ms` is when the command was started, also for its lines. `source` is setup_commands, entrypoint or exec
    for commands, stats for the states of the devbox, kmsg for what the kernel did to it.
    """

    level: str
    """info or error. Example: `"info"`"""
    timestamp_ms: int
    """When its command was started, or the event happened, in Unix milliseconds. Example: `1764352800000`"""
    source: str
    """setup_commands, entrypoint, exec, stats or kmsg. Example: `"exec"`"""
    message: str
    """What there is to tell. Example: `"-> make test"`"""
    cmd_id: str | None = None
    """The execution to which it belongs. Example: `"exe_0BwT25a4ESR05DXUEbW3kZ"`"""
    cmd: str | None = None
    """The command. Example: `"make test"`"""
    shell_name: str | None = None
    """The named shell. Example: `null`"""
    exit_code: int | None = None
    """The exit code, once it has ended. Example: `0`"""


def states(devbox: Devbox) -> list[LogEntry]:
    """An entry for each state, with its reason where there is one."""
    found = []
    for number, step in enumerate(devbox.transitions, 1):
        last = number == len(devbox.transitions)
        reasons = (devbox.shutdown_reason, devbox.failure_reason) if last else ()
        told = ": ".join(reason for reason in (*reasons, step.failure_reason) if reason)
        message = f"the devbox is {step.status}" + (f": {told}" if told else "")
        level = "error" if step.status == Status.FAILURE else "info"
        found.append(LogEntry(level, step.transition_time_ms, "stats", message))
    return found


def in_order(of_states: Sequence[LogEntry], incidents: Sequence[Incident]) -> list[LogEntry]:
    """Entries of states, and one for each incident, oldest first."""
    happened = [
        LogEntry("info" if incident.kind == "disk_room" else "error", incident.time_ms, "kmsg", incident.message)
        for incident in incidents
    ]
    return sorted([*of_states, *happened], key=_time)


def newest(looking: Looking, rows: Sequence[Execution], events: Sequence[LogEntry]) -> list[LogEntry]:
    """The newest entries of executions (given newest first) and events (oldest first), oldest first.

    Reads many journals: for a thread.
    """
    told: list[Execution | LogEntry] = sorted([*events, *reversed(rows)], key=_time)
    kept: list[LogEntry] = []
    size = 0
    while told:
        item = told.pop()
        group = [item] if isinstance(item, LogEntry) else _entries_of(looking, item, MAX_ENTRIES - len(kept))
        for entry in reversed(group):
            size += len(entry.message.encode())
            if len(kept) == MAX_ENTRIES or size > MAX_BYTES:
                return kept[::-1]
            kept.append(entry)
    return kept[::-1]


def command(row: Execution) -> LogEntry:
    """The entry of the command itself."""
    text = row.command[:COMMAND_SHOWN]
    return msgspec.structs.replace(_base(row), message=f"-> {text}", cmd=text, exit_code=row.exit_status)


def lines(row: Execution, stream: Stream, text: str) -> list[LogEntry]:
    """An entry for each line of a text that the command wrote."""
    base = msgspec.structs.replace(_base(row), level=_LEVELS[stream])
    found = text.removesuffix("\n").split("\n") if text else []
    return [msgspec.structs.replace(base, message=line) for line in found]


def _entries_of(looking: Looking, row: Execution, most: int) -> list[LogEntry]:
    """The command and at most so many lines of the end of each of its streams, none of them very long."""
    entries = [command(row)]
    for stream in _LEVELS:
        text, cut = looking.tail(row, stream, most)
        entries += map(_shortened, lines(row, stream, f"{_LEFT_OUT}\n{text}" if cut else text))
    return entries


def _shortened(entry: LogEntry) -> LogEntry:
    data = entry.message.encode()
    if len(data) <= MAX_LINE:
        return entry
    return msgspec.structs.replace(entry, message=_LEFT_OUT + data[-MAX_LINE:].decode("utf-8", "ignore"))


def _base(row: Execution) -> LogEntry:
    source = _SOURCES.get(row.purpose, "exec")
    return LogEntry("info", row.create_time_ms, source, "", row.handle, shell_name=row.shell_name)


def _time(item: Execution | LogEntry) -> int:
    return item.create_time_ms if isinstance(item, Execution) else item.timestamp_ms
