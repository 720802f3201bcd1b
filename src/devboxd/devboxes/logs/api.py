"""The logs of a devbox: its states, what happened to it, each command that ran there, and what it said."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from starlette.responses import Response

from devboxd.devboxes.incidents import Incidents
from devboxd.devboxes.lifecycle import Devboxes
from devboxd.devboxes.logs import entries
from devboxd.devboxes.logs.entries import LogEntry
from devboxd.devboxes.logs.tail import LogTail
from devboxd.executions.looking import Looking
from devboxd.http.operation import Call
from devboxd.http.parameters import OfExecution, OfShell
from devboxd.http.streams import Places, events


class LogsView(msgspec.Struct, frozen=True):
    """Entries, oldest first; the oldest are left out where there are too many."""

    logs: list[LogEntry]
    """The entries."""


async def list_logs(
    devboxes: Devboxes,
    looking: Looking,
    incidents: Incidents,
    call: Call,
    devbox_id: str,
    execution_id: OfExecution = None,
    shell_name: OfShell = None,
) -> LogsView:
    """The newest 1000 entries, at most 1 MiB of text, also of a devbox that has ended.

    Of each stream its last 1 MiB is looked at, of a line its last 16 KiB; `...` stands for what is left out. With
    `execution_id` or `shell_name` those of one execution or named shell alone.

    ```python
    logs = client.devboxes.logs.list(box.id)
    ```
    """
    devbox = await devboxes.get(call.account, devbox_id)
    if execution_id:
        await looking.get(devbox_id, execution_id)
    own: list[LogEntry] = []
    if not execution_id and not shell_name:
        if not devbox.disk_freed:
            await asyncio.to_thread(incidents.look, [devbox])
        own = entries.in_order(entries.states(devbox), incidents.of(devbox_id))
    found = await looking.newest(devbox_id, execution_id or None, shell_name or None, entries.MAX_ENTRIES)
    return LogsView(await asyncio.to_thread(entries.newest, looking, found, own))


async def tail_logs(
    devboxes: Devboxes,
    looking: Looking,
    tailing: LogTail,
    places: Places,
    call: Call,
    devbox_id: str,
    execution_id: OfExecution = None,
    shell_name: OfShell = None,
) -> Annotated[Response, "text/event-stream", LogEntry, 429]:
    """Events with the entries that a list would give, then with each new one, until the devbox has ended.

    With `execution_id` until that execution has ended. A command that was running when it was told is told again with
    its exit code. Lines come when they are whole, or in pieces of 16 KiB.

    ```python
    answer = client.get(f"/v1/devboxes/{box.id}/logs/tail", cast_to=str)
    ```
    """
    devbox = await devboxes.get(call.account, devbox_id)
    if execution_id:
        await looking.get(devbox_id, execution_id)
    return events(tailing.stream(devbox, execution_id or None, shell_name or None), places)
