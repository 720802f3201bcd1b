"""Rows of devboxes: the statements, built once, and the record that they give."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, func, insert, select, text, update

from devboxd.devboxes.states import Status
from devboxd.devboxes.views import DevboxView, LaunchParameters, StateTransition
from devboxd.store.schema import devboxes as table


class Devbox(msgspec.Struct, frozen=True):
    """A devbox as the store has it."""

    id: str
    account_id: str
    name: str | None
    status: Status
    create_time_ms: int
    end_time_ms: int | None
    deadline_ms: int
    failure_reason: str | None
    shutdown_reason: str | None
    transitions: list[StateTransition]
    metadata: dict[str, str]
    launch_parameters: LaunchParameters
    environment: dict[str, str]
    file_mounts: dict[str, str]
    entrypoint: str | None
    prepared: bool
    disk_freed: bool
    swept: bool
    snapshot_id: str | None = None
    image: str | None = None
    boots: int = 0
    idle_since_ms: int | None = None
    position: str = ""

    def view(self) -> DevboxView:
        """What clients see."""
        return DevboxView(
            id=self.id,
            status=self.status,
            name=self.name,
            create_time_ms=self.create_time_ms,
            end_time_ms=self.end_time_ms,
            capabilities=[],
            metadata=self.metadata,
            launch_parameters=self.launch_parameters,
            state_transitions=self.transitions,
            failure_reason=self.failure_reason,
            shutdown_reason=self.shutdown_reason,
            snapshot_id=self.snapshot_id,
        )


_JSON = {
    "transitions": list[StateTransition],
    "metadata": dict[str, str],
    "launch_parameters": LaunchParameters,
    "environment": dict[str, str],
    "file_mounts": dict[str, str],
}
_ONE = select(table).where(table.c.id == bindparam("id"))
_UNFREED = text("NOT disk_freed")
"""In the words of an index, as below: so what has ended is not looked at."""
_UNSWEPT = text("NOT swept AND disk_freed")
_LIVE = select(table).where(_UNFREED).order_by(table.c.id)
_INSERT = insert(table)
_MADE_FROM = (
    select(table.c.id)
    .where(_UNFREED, table.c.snapshot_id == bindparam("snapshot_id"))
    .where(table.c.status == Status.PROVISIONING, table.c.boots == 0)
    .limit(1)
)


def _record(row: Any) -> Devbox:
    values = dict(row._mapping)
    for column, kind in _JSON.items():
        values[column] = msgspec.json.decode(values[column], type=kind)
    values["status"] = Status(values["status"])
    return Devbox(**values)


def _columns(values: dict[str, Any]) -> dict[str, Any]:
    return {
        column: msgspec.json.encode(value).decode() if column in _JSON else value for column, value in values.items()
    }


def add(connection: Connection, devbox: Devbox) -> None:
    """Insert a new devbox."""
    connection.execute(_INSERT, _columns(msgspec.structs.asdict(devbox)))


def get(connection: Connection, devbox_id: str) -> Devbox | None:
    """The devbox of this id, or None."""
    row = connection.execute(_ONE, {"id": devbox_id}).first()
    return None if row is None else _record(row)


def change(connection: Connection, devbox: Devbox, **values: Any) -> Devbox:
    """Write the given columns and return the devbox as it is now."""
    connection.execute(update(table).where(table.c.id == devbox.id).values(**_columns(values)))
    return msgspec.structs.replace(devbox, **values)


def made_from(connection: Connection, snapshot_id: str) -> bool:
    """Whether a devbox is being made from a snapshot at this moment."""
    return connection.execute(_MADE_FROM, {"snapshot_id": snapshot_id}).first() is not None


def unfinished(connection: Connection) -> list[Devbox]:
    """All devboxes that live, and ended ones whose disk was not freed yet; oldest first."""
    return [_record(row) for row in connection.execute(_LIVE)]


def ended_before(connection: Connection, time_ms: int, after: str, limit: int) -> list[str]:
    """Ids above `after` of at most `limit` devboxes that ended before this time and still hold executions."""
    query = select(table.c.id).where(_UNSWEPT, table.c.end_time_ms < time_ms, table.c.id > after)
    return [row.id for row in connection.execute(query.order_by(table.c.id).limit(limit))]


def page(
    connection: Connection,
    account: str,
    status: str | None,
    starting_after: str | None,
    limit: int,
    count: bool,
) -> tuple[list[Devbox], bool, int | None]:
    """Newest first, after the id `starting_after`: (devboxes, whether more follow, the count of all that match)."""
    condition = table.c.account_id == account
    if status is not None:
        condition &= table.c.status == status
    total = connection.scalar(select(func.count()).select_from(table).where(condition)) if count else None
    if starting_after is not None:
        condition &= table.c.position < _position(connection, starting_after)
    rows = connection.execute(select(table).where(condition).order_by(table.c.position.desc()).limit(limit + 1)).all()
    return [_record(row) for row in rows[:limit]], len(rows) > limit, total


def _position(connection: Connection, devbox_id: str) -> str:
    """The place of a devbox in pages; of an unknown one that of its id."""
    found: str | None = connection.scalar(select(table.c.position).where(table.c.id == devbox_id))
    return devbox_id if found is None else found


def mark_swept(connection: Connection, devbox_id: str) -> None:
    """Remember that the executions and journals of a devbox were removed."""
    connection.execute(update(table).where(table.c.id == devbox_id).values(swept=True))
