"""The first tables: accounts, keys, requests, devboxes, executions."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables of the first release."""
    _accounts_and_keys()
    _requests()
    _devboxes()
    _executions()


def _accounts_and_keys() -> None:
    op.create_table(
        "accounts",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("create_time_ms", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "keys",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("account_id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False, unique=True),
        sa.Column("create_time_ms", sa.BigInteger, nullable=False),
        sa.Column("expires_at_ms", sa.BigInteger),
        sa.Column("revoke_time_ms", sa.BigInteger),
    )


def _requests() -> None:
    op.create_table(
        "requests",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("body_hash", sa.String(64), nullable=False),
        sa.Column("ref", sa.String(128)),
        sa.Column("status", sa.Integer),
        sa.Column("headers", sa.Text),
        sa.Column("answer", sa.LargeBinary),
        sa.Column("create_time_ms", sa.BigInteger, nullable=False, index=True),
    )


def _devboxes() -> None:
    op.create_table(
        "devboxes",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("account_id", sa.String(64), nullable=False),
        sa.Column("name", sa.Text),
        sa.Column("status", sa.String(32), nullable=False),
        sa.Column("create_time_ms", sa.BigInteger, nullable=False),
        sa.Column("end_time_ms", sa.BigInteger),
        sa.Column("deadline_ms", sa.BigInteger, nullable=False),
        sa.Column("failure_reason", sa.String(32)),
        sa.Column("shutdown_reason", sa.String(32)),
        sa.Column("transitions", sa.Text, nullable=False),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("launch_parameters", sa.Text, nullable=False),
        sa.Column("environment", sa.Text, nullable=False),
        sa.Column("file_mounts", sa.Text, nullable=False),
        sa.Column("entrypoint", sa.Text),
        sa.Column("prepared", sa.Boolean, nullable=False),
        sa.Column("disk_freed", sa.Boolean, nullable=False),
        sa.Column("swept", sa.Boolean, nullable=False),
    )
    op.create_index("devboxes_by_account", "devboxes", ["account_id", "id"])
    op.create_index("devboxes_by_status", "devboxes", ["status"])


def _executions() -> None:
    op.create_table(
        "executions",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("devbox_id", sa.String(64), nullable=False),
        sa.Column("handle", sa.String(128), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("command", sa.Text, nullable=False),
        sa.Column("shell_name", sa.Text),
        sa.Column("attach_stdin", sa.Boolean, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("exit_status", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("stdout_length", sa.BigInteger),
        sa.Column("stderr_length", sa.BigInteger),
        sa.Column("stdout_truncated", sa.Boolean, nullable=False),
        sa.Column("stderr_truncated", sa.Boolean, nullable=False),
        sa.Column("stdin_length", sa.BigInteger, nullable=False),
        sa.Column("stdin_eof", sa.Boolean, nullable=False),
        sa.Column("create_time_ms", sa.BigInteger, nullable=False),
        sa.Column("end_time_ms", sa.BigInteger),
    )
    op.create_index("executions_by_handle", "executions", ["devbox_id", "handle"], unique=True)
    op.create_index("executions_by_status", "executions", ["devbox_id", "status"])
