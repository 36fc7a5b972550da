"""Predictors that learn while a job runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0_3_0"
down_revision = "v0_2_0"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "predictors",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("pairs", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("version", sa.String(length=64), nullable=False),
        sa.Column("evaluator", sa.String(length=100), nullable=False),
        sa.Column("state", sa.JSON(), nullable=False),
        sa.Column("made_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_predictors_jobs"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "pairs", name=op.f("pk_predictors")),
        sa.UniqueConstraint("job_id", "version", name=op.f("uq_predictors_job_id_version")),
        sqlite_with_rowid=False,
    )
