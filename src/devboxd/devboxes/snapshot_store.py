"""Rows of snapshots, and the record that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Connection, bindparam, func, insert, literal, select, text, update

from devboxd.store.schema import snapshots as table

IN_PROGRESS, COMPLETE, ERROR, DELETED = "in_progress", "complete", "error", "deleted"


class Snapshot(msgspec.Struct, frozen=True):
    """A snapshot as the store has it."""

    id: str
    account_id: str
    devbox_id: str
    image: str | None
    name: str | None
    commit_message: str | None
    metadata: dict[str, str]
    status: str
    error: str | None
    size_bytes: int | None
    manifest_digest: str | None
    create_time_ms: int


_ONE = select(table).where(table.c.id == bindparam("id"))
_INSERT = insert(table)
_SHOWN = table.c.status.in_((IN_PROGRESS, COMPLETE))
_UNFINISHED = select(table).where(text("status = 'in_progress'"))


def _record(row: Any) -> Snapshot:
    values = dict(row._mapping)
    values["metadata"] = msgspec.json.decode(values["metadata"], type=dict[str, str])
    return Snapshot(**values)


def _columns(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: msgspec.json.encode(value).decode() if name == "metadata" else value for name, value in values.items()
    }


def add(connection: Connection, snapshot: Snapshot) -> None:
    """Insert a new snapshot."""
    connection.execute(_INSERT, _columns(msgspec.structs.asdict(snapshot)))


def get(connection: Connection, snapshot_id: str) -> Snapshot | None:
    """The snapshot of this id, also a deleted one, or None."""
    row = connection.execute(_ONE, {"id": snapshot_id}).first()
    return None if row is None else _record(row)


def change(connection: Connection, snapshot: Snapshot, **values: Any) -> Snapshot:
    """Write the given columns and return the snapshot as it is now."""
    connection.execute(update(table).where(table.c.id == snapshot.id).values(**_columns(values)))
    return msgspec.structs.replace(snapshot, **values)


def unfinished(connection: Connection) -> list[Snapshot]:
    """Those that were begun and not finished."""
    return [_record(row) for row in connection.execute(_UNFINISHED)]


def complete(connection: Connection) -> list[Snapshot]:
    """All that devboxes can begin from."""
    return [_record(row) for row in connection.execute(select(table).where(table.c.status == COMPLETE))]


def wanted(connection: Connection) -> set[str]:
    """The ids of all whose disks are kept."""
    return set(connection.scalars(select(table.c.id).where(table.c.status == COMPLETE)))


def page(
    connection: Connection,
    account: str,
    devbox_id: str | None,
    metadata: Mapping[str, Sequence[str]],
    starting_after: str | None,
    limit: int,
    count: bool,
) -> tuple[list[Snapshot], bool, int | None]:
    """Newest first, after the id `starting_after`: (snapshots, whether more follow, the count of all that match)."""
    condition = (table.c.account_id == account) & _SHOWN
    if devbox_id is not None:
        condition &= table.c.devbox_id == devbox_id
    for key, values in metadata.items():
        condition &= _value(key).in_(values)
    total = connection.scalar(select(func.count()).select_from(table).where(condition)) if count else None
    if starting_after is not None:
        condition &= table.c.id < starting_after
    rows = connection.execute(select(table).where(condition).order_by(table.c.id.desc()).limit(limit + 1)).all()
    return [_record(row) for row in rows[:limit]], len(rows) > limit, total


def keys(connection: Connection, account: str) -> list[str]:
    """All keys of the metadata of an account's snapshots, in their order."""
    entries = func.json_each(table.c.metadata).table_valued("key", "value")
    query = select(entries.c.key).select_from(table).join(entries, literal(True))
    return sorted(set(connection.scalars(query.where(table.c.account_id == account, _SHOWN))))


def values_of(connection: Connection, account: str, key: str) -> list[str]:
    """All values that a key has in the metadata of an account's snapshots, in their order."""
    query = select(_value(key)).where(table.c.account_id == account, _SHOWN, _value(key).is_not(None))
    return sorted(set(connection.scalars(query)))


def _value(key: str) -> ColumnElement[str]:
    """The value of a key of the metadata. SQLite's path has no escape for a quote, so the key is compared instead."""
    entries = func.json_each(table.c.metadata).table_valued("key", "value")
    return select(entries.c.value).where(entries.c.key == key).scalar_subquery()
