"""Controllers, reuse, counted commits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "v0_2_0"
down_revision = "v0_1_0"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "controllers",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("host", sa.String(length=255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("ray", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=False),
        sa.Column("seen_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_controllers")),
    )
    op.create_table(
        "reuses",
        sa.Column("job_id", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("origin_job_id", sa.Integer(), nullable=False),
        sa.Column("origin_number", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id", "number"],
            ["evaluations.job_id", "evaluations.number"],
            name=op.f("fk_reuses_evaluations"),
            ondelete="CASCADE",
        ),
        sa.ForeignKeyConstraint(
            ["origin_job_id", "origin_number"],
            ["evaluations.job_id", "evaluations.number"],
            name="fk_reuses_origin",
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_reuses")),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_evaluations_candidate_id", "evaluations", ["candidate_id"])
    # Of the finished alone: one entry a row to write instead of two, and the highest fidelity reached is at its end.
    op.drop_index("ix_evaluations_job_id_fidelity_seq", "evaluations")
    done = sa.text("state = 'done'")
    columns = ["job_id", "fidelity", "seq"]
    op.create_index("ix_evaluations_done", "evaluations", columns, sqlite_where=done, postgresql_where=done)
    columns = ["job_id", "fidelity", "left_seq"]
    op.create_index("ix_front_members_job_id_fidelity_left_seq", "front_members", columns)
    # Plain ALTER TABLE: batch mode would copy the table, and dropping the old one would cascade to all that refers to it.
    op.add_column("jobs", sa.Column("managed", sa.Boolean(), server_default=sa.false(), nullable=False))
    op.add_column("jobs", sa.Column("work_digest", sa.String(length=32), nullable=True))
    op.add_column("jobs", sa.Column("files", sa.Text(), nullable=True))
    op.create_index(op.f("ix_jobs_work_digest"), "jobs", ["work_digest"])
    op.add_column("leases", sa.Column("commits", sa.Integer(), server_default="0", nullable=False))
