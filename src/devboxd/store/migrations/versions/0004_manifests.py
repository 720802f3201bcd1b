"""The digest of what a snapshot holds, once somebody has asked for it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Snapshots that are there get theirs when somebody asks."""
    op.add_column("snapshots", sa.Column("manifest_digest", sa.String(64)))
