"""The tables. Times are integer Unix milliseconds, maps and lists are JSON text, ids sort by time.

They do so byte by byte, as SQLite compares text, and pages rely on it. A PostgreSQL store must give the columns of ids
the collation "C": others sort capitals among the small letters.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData()


def _partial(name: str, columns: list[str], condition: str) -> Index:
    """An index of the rows for which something is so; a query uses it that asks for this in the same words."""
    return Index(name, *columns, sqlite_where=text(condition), postgresql_where=text(condition))


accounts = Table(
    "accounts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("create_time_ms", BigInteger, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("create_time_ms", BigInteger, nullable=False),
    Column("expires_at_ms", BigInteger),
    Column("revoke_time_ms", BigInteger),
)

requests = Table(
    "requests",
    metadata,
    Column("key", String(64), primary_key=True),
    Column("body_hash", String(64), nullable=False),
    Column("ref", String(128)),
    Column("status", Integer),
    Column("headers", Text),
    Column("answer", LargeBinary),
    Column("create_time_ms", BigInteger, nullable=False, index=True),
)
"""Requests with an effect that were done: `key` hashes account, method, path and x-request-id."""

devboxes = Table(
    "devboxes",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", String(64), nullable=False),
    Column("name", Text),
    Column("status", String(32), nullable=False),
    Column("create_time_ms", BigInteger, nullable=False),
    Column("end_time_ms", BigInteger),
    Column("deadline_ms", BigInteger, nullable=False),
    Column("failure_reason", String(32)),
    Column("shutdown_reason", String(32)),
    Column("transitions", Text, nullable=False),
    Column("metadata", Text, nullable=False),
    Column("launch_parameters", Text, nullable=False),
    Column("environment", Text, nullable=False),
    Column("file_mounts", Text, nullable=False),
    Column("entrypoint", Text),
    Column("prepared", Boolean, nullable=False),
    Column("disk_freed", Boolean, nullable=False),
    Column("swept", Boolean, nullable=False),
    Column("snapshot_id", String(64)),
    Column("image", Text),
    Column("boots", Integer, nullable=False, server_default="0"),
    Column("idle_since_ms", BigInteger),
    Column("position", String(64)),
    Index("devboxes_by_account", "account_id", "position"),
    Index("devboxes_by_status", "status"),
    _partial("devboxes_unfreed", ["id"], "NOT disk_freed"),
    _partial("devboxes_unswept", ["id", "end_time_ms"], "NOT swept AND disk_freed"),
)
"""`prepared`: files and launch commands are done. `swept`: executions and journals were removed after retention.
`position`: an id of the moment of the create, by which pages are sorted; the id itself may be older.
`boots`: how often it was resumed. `image`: the name of what it starts from, once it has."""

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", String(64), nullable=False),
    Column("devbox_id", String(64), nullable=False),
    Column("image", Text),
    Column("name", Text),
    Column("commit_message", Text),
    Column("metadata", Text, nullable=False),
    Column("status", String(16), nullable=False),
    Column("error", Text),
    Column("size_bytes", BigInteger),
    Column("manifest_digest", String(64)),
    Column("create_time_ms", BigInteger, nullable=False),
    Index("snapshots_by_account", "account_id", "id"),
    Index("snapshots_by_box", "devbox_id", "id"),
    _partial("snapshots_in_progress", ["id"], "status = 'in_progress'"),
)
"""Rows stay when a snapshot is deleted: its status is `deleted` then."""

executions = Table(
    "executions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("devbox_id", String(64), nullable=False),
    Column("handle", String(128), nullable=False),
    Column("purpose", String(16), nullable=False),
    Column("command", Text, nullable=False),
    Column("shell_name", Text),
    Column("attach_stdin", Boolean, nullable=False),
    Column("status", String(16), nullable=False),
    Column("exit_status", Integer),
    Column("error", Text),
    Column("stdout_length", BigInteger),
    Column("stderr_length", BigInteger),
    Column("stdout_truncated", Boolean, nullable=False),
    Column("stderr_truncated", Boolean, nullable=False),
    Column("stdin_length", BigInteger, nullable=False),
    Column("stdin_eof", Boolean, nullable=False),
    Column("create_time_ms", BigInteger, nullable=False),
    Column("end_time_ms", BigInteger),
    Index("executions_by_handle", "devbox_id", "handle", unique=True),
    Index("executions_by_box", "devbox_id", "id"),
    _partial("executions_by_shell", ["devbox_id", "shell_name", "id"], "shell_name IS NOT NULL"),
    _partial("executions_unfinished", ["devbox_id", "id"], "status != 'completed'"),
)
"""`handle` is the id on the wire: the caller's command_id for `execute`, else the own id. `purpose`: user, launch
or entrypoint."""
