"""A front's members with what a reader asks of them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0_4_0"
down_revision = "v0_3_0"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # Null in what is there already: those members are read from the tables as before.
    op.add_column("front_members", sa.Column("shown", sa.Text(), nullable=True))
