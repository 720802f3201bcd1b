"""Indexes with which nothing that is asked often looks at all that has ended."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """One index for each question; those on what has not ended are small and cost an ended row nothing."""
    op.drop_index("executions_by_status", "executions")
    op.create_index("executions_by_box", "executions", ["devbox_id", "id"])
    _partial("executions_by_shell", "executions", ["devbox_id", "shell_name", "id"], "shell_name IS NOT NULL")
    _partial("executions_unfinished", "executions", ["devbox_id", "id"], "status != 'completed'")
    _partial("devboxes_unfreed", "devboxes", ["id"], "NOT disk_freed")
    _partial("devboxes_unswept", "devboxes", ["id", "end_time_ms"], "NOT swept AND disk_freed")


def _partial(name: str, table: str, columns: list[str], condition: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(condition), postgresql_where=sa.text(condition))
