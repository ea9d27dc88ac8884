"""On Postgres: which transaction wrote an event, because numbers do not come in the order of commits; last commits."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from metering.ledger import types

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    current_xid = sa.text("(pg_current_xact_id()::text)::bigint")
    op.add_column("events", sa.Column("commit_xid", sa.BigInteger(), server_default=current_xid, nullable=False))
    op.create_index(op.f("ix_events_commit_xid"), "events", ["commit_xid"], unique=False)
    op.create_table(
        "writer_commits",
        sa.Column("writer", types.Uuid(), nullable=False),
        sa.Column("mark", types.Uuid(), nullable=False),
        sa.Column("marked_at", types.UtcDateTime(length=27), nullable=False),
        sa.PrimaryKeyConstraint("writer", name=op.f("pk_writer_commits")),
    )
