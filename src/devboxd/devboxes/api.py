"""The operations on devboxes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from devboxd.concurrency.clock import now_ms
from devboxd.devboxes.lifecycle import Devboxes
from devboxd.devboxes.states import WIRE_STATUSES, Event
from devboxd.devboxes.usage import DevboxUsageView, used
from devboxd.devboxes.views import (
    CreateDevbox,
    DevboxListView,
    DevboxView,
    UpdateDevbox,
    WaitForStatus,
    check_labels,
)
from devboxd.errors import bad_request, timed_out
from devboxd.http.operation import Call
from devboxd.http.parameters import IncludeTotalCount, Limit, StartingAfter
from devboxd.http.streams import HELD_S
from devboxd.ids import check_id

_OfStatus = Annotated[str | None, Meta(description="Only devboxes with this status.", examples=["running"])]
_Force = Annotated[
    bool, Meta(description="Whether a snapshot that is being taken is given up for it.", examples=[False])
]
_CREATE_HOLD_S = 20.0
_WAIT_S = 10.0
_MAX_PAGE = 5000
_SETTLED = frozenset({"running", "failure", "shutdown"})


async def create_devbox(devboxes: Devboxes, call: Call, body: CreateDevbox | None = None) -> DevboxView:
    """Make a devbox; the answer comes at once, while it is `provisioning`.

    ```python
    box = client.devboxes.create(name="first", launch_parameters={"resource_size_request": "MEDIUM"})
    ```
    """
    return (await devboxes.create(call.account, body or CreateDevbox(), call.once)).view()


async def create_and_await_running(devboxes: Devboxes, call: Call, body: CreateDevbox | None = None) -> DevboxView:
    """Make a devbox and hold the answer until it runs or has failed, at most 20 s; then it shows how far it came.

    ```python
    box = client.devboxes.create_and_await_running(name="first")
    ```
    """
    devbox = await devboxes.create(call.account, body or CreateDevbox(), call.once)
    reached = await devboxes.reached(devbox, _SETTLED, _CREATE_HOLD_S)
    return (reached or await devboxes.get(call.account, devbox.id)).view()


async def retrieve_devbox(devboxes: Devboxes, call: Call, devbox_id: str) -> DevboxView:
    """The devbox as it is now.

    ```python
    box = client.devboxes.retrieve(box.id)
    ```
    """
    return (await devboxes.get(call.account, devbox_id)).view()


async def list_devboxes(
    devboxes: Devboxes,
    call: Call,
    limit: Limit = 20,
    starting_after: StartingAfter = None,
    status: _OfStatus = None,
    include_total_count: IncludeTotalCount = True,
) -> DevboxListView:
    """A page of the account's devboxes, newest first, all or those of one status.

    ```python
    boxes = client.devboxes.list(status="running", limit=100)
    ```
    """
    if not 1 <= limit <= _MAX_PAGE:
        raise bad_request(f"cannot list {limit} devboxes: limit is 1 to {_MAX_PAGE}")
    if starting_after:
        check_id("dbx", starting_after, "devbox")
    _check_statuses([status] if status else [])
    page, more, total = await devboxes.page(
        call.account, status or None, starting_after or None, limit, include_total_count
    )
    return DevboxListView([devbox.view() for devbox in page], more, total)


async def update_devbox(devboxes: Devboxes, call: Call, devbox_id: str, body: UpdateDevbox | None = None) -> DevboxView:
    """Change name or metadata: what is absent stays, an empty value clears.

    ```python
    client.devboxes.update(box.id, name="renamed", metadata={"team": "search"})
    ```
    """
    body = body or UpdateDevbox()
    check_labels(
        body.name if isinstance(body.name, str) else None, body.metadata if isinstance(body.metadata, dict) else None
    )
    return (await devboxes.update(call.account, devbox_id, body, call.once)).view()


async def wait_for_devbox(devboxes: Devboxes, call: Call, devbox_id: str, body: WaitForStatus) -> DevboxView:
    """Hold the answer until the devbox has one of the statuses; 408 when the time (24 s at most) is over first.

    ```python
    box = client.devboxes.await_running(box.id)
    ```
    """
    if not body.statuses:
        raise bad_request("cannot wait for no status: give at least one in `statuses`")
    _check_statuses(body.statuses)
    seconds = _WAIT_S if body.timeout_seconds is None else body.timeout_seconds
    if not seconds >= 0:
        raise bad_request(f"cannot wait {seconds:g} s: timeout_seconds is a number of seconds from 0")
    devbox = await devboxes.get(call.account, devbox_id)
    reached = await devboxes.reached(devbox, frozenset(body.statuses), min(seconds, HELD_S))
    if reached is None:
        raise timed_out(f"cannot say yet that {devbox_id} is {' or '.join(body.statuses)}; ask again")
    return reached.view()


async def retrieve_usage(devboxes: Devboxes, call: Call, devbox_id: str) -> DevboxUsageView:
    """What the devbox has used in its life, and what it uses at this moment while it lives (`live`).

    ```python
    usage = client.devboxes.retrieve_resource_usage(box.id)
    ```
    """
    devbox = await devboxes.get(call.account, devbox_id)
    return used(devbox, now_ms(), await devboxes.figures(devbox), devboxes.awake(devbox_id))


async def keep_alive(devboxes: Devboxes, call: Call, devbox_id: str) -> None:
    """Let the devbox live for keep_alive_time_seconds from now on, and be idle from now on at the earliest.

    ```python
    client.devboxes.keep_alive(box.id)
    ```
    """
    await devboxes.ask(call.account, devbox_id, Event.KEEP_ALIVE_ASKED)


async def shutdown_devbox(devboxes: Devboxes, call: Call, devbox_id: str, force: _Force = False) -> DevboxView:
    """End the devbox and free its disk; once it has ended this changes nothing.

    While a snapshot of it is being taken: 409, unless `force` is true.

    ```python
    client.devboxes.shutdown(box.id)
    ```
    """
    return (await devboxes.shutdown(call.account, devbox_id, force)).view()


async def suspend_devbox(devboxes: Devboxes, call: Call, devbox_id: str) -> DevboxView:
    """End all processes after the suspend commands, keep the disk; the answer comes at once.

    ```python
    client.devboxes.suspend(box.id)
    ```
    """
    return (await devboxes.ask(call.account, devbox_id, Event.SUSPEND_ASKED, call.once)).view()


async def resume_devbox(devboxes: Devboxes, call: Call, devbox_id: str) -> DevboxView:
    """Start a suspended devbox again from its disk; the answer comes at once.

    ```python
    client.devboxes.resume(box.id)
    ```
    """
    return (await devboxes.ask(call.account, devbox_id, Event.RESUME_ASKED, call.once)).view()


def _check_statuses(statuses: list[str]) -> None:
    for status in statuses:
        if status not in WIRE_STATUSES:
            raise bad_request(f"cannot use {status[:64]!r} as a status: one of {', '.join(sorted(WIRE_STATUSES))}")
