"""Snapshots of disks, and what a devbox needs to come back from its own."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Pages of devboxes follow their creates from now on: an id may have been made before."""
    for column in (
        sa.Column("snapshot_id", sa.String(64)),
        sa.Column("image", sa.Text),
        sa.Column("boots", sa.Integer, nullable=False, server_default="0"),
        sa.Column("idle_since_ms", sa.BigInteger),
        sa.Column("position", sa.String(64)),
    ):
        op.add_column("devboxes", column)
    op.execute("UPDATE devboxes SET position = id")
    op.drop_index("devboxes_by_account", "devboxes")
    op.create_index("devboxes_by_account", "devboxes", ["account_id", "position"])
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("account_id", sa.String(64), nullable=False),
        sa.Column("devbox_id", sa.String(64), nullable=False),
        sa.Column("image", sa.Text),
        sa.Column("name", sa.Text),
        sa.Column("commit_message", sa.Text),
        sa.Column("metadata", sa.Text, nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("error", sa.Text),
        sa.Column("size_bytes", sa.BigInteger),
        sa.Column("create_time_ms", sa.BigInteger, nullable=False),
    )
    op.create_index("snapshots_by_account", "snapshots", ["account_id", "id"])
    op.create_index("snapshots_by_box", "snapshots", ["devbox_id", "id"])
    condition = sa.text("status = 'in_progress'")
    op.create_index("snapshots_in_progress", "snapshots", ["id"], sqlite_where=condition, postgresql_where=condition)
