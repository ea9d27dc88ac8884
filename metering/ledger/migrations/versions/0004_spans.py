"""What was traced: spans, beside the events that are billed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from metering.ledger import types

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "spans",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("trace_id", sa.String(length=255), nullable=False),
        sa.Column("span_id", sa.String(length=255), nullable=False),
        sa.Column("parent_span_id", sa.String(length=255), nullable=True),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=True),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("convention", sa.String(length=16), nullable=True),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_read_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_write_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_write_1h_tokens", sa.BigInteger(), nullable=False),
        sa.Column("input_audio_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_audio_tokens", sa.BigInteger(), nullable=False),
        sa.Column("provider", sa.String(length=255), nullable=True),
        sa.Column("model", sa.String(length=255), nullable=True),
        sa.Column("started_at", types.UtcDateTime(length=27), nullable=True),
        sa.Column("ended_at", types.UtcDateTime(length=27), nullable=True),
        sa.Column("recorded_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("flags", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_spans")),
        sa.UniqueConstraint("trace_id", "span_id", name=op.f("uq_spans_trace_id_span_id")),
        sqlite_autoincrement=True,
    )
    if op.get_bind().dialect.name == "postgresql":
        current_xid = sa.text("(pg_current_xact_id()::text)::bigint")
        op.add_column("spans", sa.Column("commit_xid", sa.BigInteger(), server_default=current_xid, nullable=False))
        op.create_index(op.f("ix_spans_commit_xid"), "spans", ["commit_xid"], unique=False)
