"""The logs of a devbox: each command that ran there, and the last lines that it said. Made from rows and journals."""

from __future__ import annotations

import asyncio

import msgspec

from devboxd.devboxes.lifecycle import Devboxes
from devboxd.executions.looking import Looking
from devboxd.executions.store import Execution
from devboxd.http.operation import Call

MAX_ENTRIES = 1000
MAX_BYTES = 1 << 20
"""Most text in all messages of one answer."""
_SOURCES = {"setup": "setup_commands", "launch": "setup_commands", "entrypoint": "entrypoint"}


class LogEntry(msgspec.Struct, frozen=True):
    """A command ("-> ...", with its exit code once it has ended) or a line of its output.

    `timestamp_ms` is when the command was started, also for its lines.
    """

    level: str
    timestamp_ms: int
    source: str
    message: str
    cmd_id: str
    cmd: str | None = None
    shell_name: str | None = None
    exit_code: int | None = None


class LogsView(msgspec.Struct, frozen=True):
    """Entries, oldest first; the oldest are left out where there are too many."""

    logs: list[LogEntry]


async def list_logs(
    devboxes: Devboxes,
    looking: Looking,
    call: Call,
    devbox_id: str,
    execution_id: str | None = None,
    shell_name: str | None = None,
) -> LogsView:
    """What commands of the devbox said, all or those of one execution or named shell: the newest 1000 lines."""
    await devboxes.get(call.account, devbox_id)
    if execution_id:
        await looking.get(devbox_id, execution_id)
    found = await looking.newest(devbox_id, execution_id or None, shell_name or None, MAX_ENTRIES)
    return LogsView(await asyncio.to_thread(_entries, looking, found))


def _entries(looking: Looking, newest_first: list[Execution]) -> list[LogEntry]:
    kept: list[LogEntry] = []
    size = 0
    for row in newest_first:
        for entry in reversed(_entries_of(looking, row, MAX_ENTRIES - len(kept))):
            size += len(entry.message.encode())
            if len(kept) == MAX_ENTRIES or size > MAX_BYTES:
                return kept[::-1]
            kept.append(entry)
    return kept[::-1]


def _entries_of(looking: Looking, row: Execution, lines: int) -> list[LogEntry]:
    """The command and at most so many lines of each of its streams."""
    view = looking.view(row, lines)
    base = LogEntry(
        "info", row.create_time_ms, _SOURCES.get(row.purpose, "exec"), "", row.handle, shell_name=row.shell_name
    )
    with_message = msgspec.structs.replace
    entries = [with_message(base, message=f"-> {row.command}", cmd=row.command, exit_code=view.exit_status)]
    for level, text in (("info", view.stdout), ("error", view.stderr)):
        entries += [with_message(base, level=level, message=line) for line in _lines(text or "")]
    return entries


def _lines(text: str) -> list[str]:
    return text.removesuffix("\n").split("\n") if text else []
