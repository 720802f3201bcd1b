"""Rows of executions: the statements, built once, and the record that they give."""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import Connection, bindparam, delete, func, insert, literal_column, select, update

from devboxd.store.schema import executions as table
from devboxd.store.statement import Statement

COMPLETED = "completed"
RUNNING = "running"
QUEUED = "queued"


class Execution(msgspec.Struct, frozen=True):
    """An execution as the store has it; `handle` is its id on the wire."""

    id: str
    devbox_id: str
    handle: str
    purpose: str
    command: str
    shell_name: str | None
    attach_stdin: bool
    status: str
    exit_status: int | None
    error: str | None
    stdout_length: int | None
    stderr_length: int | None
    stdout_truncated: bool
    stderr_truncated: bool
    stdin_length: int
    stdin_eof: bool
    create_time_ms: int
    end_time_ms: int | None


_BY_HANDLE = Statement(
    select(table).where(table.c.devbox_id == bindparam("box"), table.c.handle == bindparam("handle"))
)
_BY_ID = Statement(select(table).where(table.c.id == bindparam("id")))
_OPEN = Statement(
    select(table)
    .where(table.c.devbox_id == bindparam("box"), table.c.status != literal_column(f"'{COMPLETED}'"))
    .order_by(table.c.id)
)
"""In the words of the index `executions_unfinished`: a bound parameter would not find it."""
COMMAND_SHOWN = 1024
"""Most characters of a command in a list of executions."""
_SHORT = [
    func.substr(column, 1, COMMAND_SHOWN).label("command") if column.name == "command" else column for column in table.c
]
_AFTER = Statement(
    select(*_SHORT)
    .where(table.c.devbox_id == bindparam("box"), table.c.id > bindparam("last"))
    .order_by(table.c.id)
    .limit(bindparam("most"))
)
_INSERT = Statement(insert(table))
_STDIN = Statement(
    update(table)
    .where(table.c.id == bindparam("key"))
    .values(stdin_length=bindparam("length"), stdin_eof=bindparam("eof"))
)
_RUNNING = Statement(
    update(table).where(table.c.id == bindparam("key"), table.c.status == QUEUED).values(status=RUNNING)
)
_COMPLETE = Statement(
    update(table)
    .where(table.c.id == bindparam("key"), table.c.status != COMPLETED)
    .values(
        status=COMPLETED,
        exit_status=bindparam("exit"),
        error=bindparam("why"),
        stdout_length=bindparam("out"),
        stderr_length=bindparam("err"),
        stdout_truncated=bindparam("out_cut"),
        stderr_truncated=bindparam("err_cut"),
        end_time_ms=bindparam("end"),
    )
)
_BOOLEANS = [number for number, column in enumerate(table.c) if column.type.python_type is bool]


_REMOVED_AT_ONCE = 1000
_REMOVE = delete(table).where(
    table.c.id.in_(select(table.c.id).where(table.c.devbox_id == bindparam("box")).limit(_REMOVED_AT_ONCE))
)


def _record(row: Any) -> Execution:
    values = list(row)
    for number in _BOOLEANS:
        values[number] = bool(values[number])
    return Execution(*values)


def by_handle(connection: Connection, devbox_id: str, handle: str) -> Execution | None:
    """The execution of a devbox that has this id on the wire, or None."""
    row = _BY_HANDLE.one(connection, {"box": devbox_id, "handle": handle})
    return None if row is None else _record(row)


def by_id(connection: Connection, execution_id: str) -> Execution | None:
    """The execution of this internal id, or None."""
    row = _BY_ID.one(connection, {"id": execution_id})
    return None if row is None else _record(row)


def unfinished(connection: Connection, devbox_id: str) -> list[Execution]:
    """All executions of a devbox that have not completed, in the order of their making."""
    return [_record(row) for row in _OPEN.run(connection, {"box": devbox_id})]


def newest(
    connection: Connection, devbox_id: str, handle: str | None, shell_name: str | None, limit: int
) -> list[Execution]:
    """The newest executions of a devbox, of this handle or shell if given; long commands are cut."""
    query = select(*_SHORT).where(table.c.devbox_id == devbox_id)
    if handle is not None:
        query = query.where(table.c.handle == handle)
    if shell_name is not None:
        query = query.where(table.c.shell_name == shell_name)
    found = connection.execute(query.order_by(table.c.id.desc()).limit(limit))
    return [_record(row) for row in found]


def shells(connection: Connection, devbox_id: str, limit: int) -> list[str]:
    """The named shells of a devbox, the one used last first."""
    query = select(table.c.shell_name).where(table.c.devbox_id == devbox_id, table.c.shell_name.is_not(None))
    newest_first = query.group_by(table.c.shell_name).order_by(func.max(table.c.id).desc())
    return list(connection.scalars(newest_first.limit(limit)))


def after(connection: Connection, devbox_id: str, last: str, limit: int) -> list[Execution]:
    """The oldest executions of a devbox with ids above `last`; long commands are cut."""
    return [_record(row) for row in _AFTER.run(connection, {"box": devbox_id, "last": last, "most": limit})]


def add(connection: Connection, execution: Execution) -> None:
    """Insert a new execution; TakenError when the devbox knows its handle."""
    _INSERT.run(connection, msgspec.structs.asdict(execution))


def set_running(connection: Connection, execution_id: str) -> None:
    """Write that an execution waits no more; one that has completed stays as it is."""
    _RUNNING.run(connection, {"key": execution_id})


def set_stdin(connection: Connection, execution_id: str, length: int, eof: bool) -> None:
    """Write how much stdin was accepted, and whether its end was."""
    _STDIN.run(connection, {"key": execution_id, "length": length, "eof": eof})


def complete(connection: Connection, done: Execution) -> None:
    """Write the outcome of an execution that has not completed yet."""
    _COMPLETE.run(
        connection,
        {
            "key": done.id,
            "exit": done.exit_status,
            "why": done.error,
            "out": done.stdout_length,
            "err": done.stderr_length,
            "out_cut": done.stdout_truncated,
            "err_cut": done.stderr_truncated,
            "end": done.end_time_ms,
        },
    )


def remove(connection: Connection, devbox_id: str) -> bool:
    """Forget some executions of a devbox, no more than others can wait for; whether there may be more."""
    return connection.execute(_REMOVE, {"box": devbox_id}).rowcount == _REMOVED_AT_ONCE
