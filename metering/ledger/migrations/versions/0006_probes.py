"""Probes of providers: what they found of rate limits, and what those that cost spent."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from metering.ledger import types

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "provider_probes",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("credential", sa.String(length=255), nullable=False),
        sa.Column("provider", sa.String(length=255), nullable=False),
        sa.Column("checked_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("reachable", sa.Boolean(), nullable=True),
        sa.Column("error", sa.String(length=64), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
        sa.Column("rate_limited", sa.Boolean(), nullable=False),
        sa.Column("retry_after_s", types.ExactDecimal(), nullable=True),
        sa.Column("models", sa.Integer(), nullable=False),
        sa.Column("sample_model", sa.String(length=255), nullable=True),
        sa.Column("sample_input_tokens", sa.BigInteger(), nullable=True),
        sa.Column("sample_output_tokens", sa.BigInteger(), nullable=True),
        sa.Column("sample_latency_ms", sa.BigInteger(), nullable=True),
        sa.Column("warnings", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_provider_probes")),
        sa.UniqueConstraint(
            "credential", "provider", "checked_at", name=op.f("uq_provider_probes_credential_provider_checked_at")
        ),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_provider_probes_checked_at"), "provider_probes", ["checked_at"], unique=False)
    if op.get_bind().dialect.name == "postgresql":
        current_xid = sa.text("(pg_current_xact_id()::text)::bigint")
        op.add_column(
            "provider_probes", sa.Column("commit_xid", sa.BigInteger(), server_default=current_xid, nullable=False)
        )
        op.create_index(op.f("ix_provider_probes_commit_xid"), "provider_probes", ["commit_xid"], unique=False)
    op.create_table(
        "provider_windows",
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("limit_value", types.ExactDecimal(), nullable=True),
        sa.Column("remaining", types.ExactDecimal(), nullable=True),
        sa.Column("percent_used", types.ExactDecimal(), nullable=True),
        sa.Column("reset_at", types.UtcDateTime(length=27), nullable=True),
        sa.ForeignKeyConstraint(["seq"], ["provider_probes.seq"], name=op.f("fk_provider_windows_seq")),
        sa.PrimaryKeyConstraint("seq", "name", name=op.f("pk_provider_windows")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "paid_probes",
        sa.Column("credential", sa.String(length=255), nullable=False),
        sa.Column("provider", sa.String(length=255), nullable=False),
        sa.Column("base_url", sa.String(length=1000), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("asked_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("model", sa.String(length=255), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=True),
        sa.Column("output_tokens", sa.BigInteger(), nullable=True),
        sa.Column("latency_ms", sa.BigInteger(), nullable=True),
        sa.Column("cost", types.ExactDecimal(), nullable=True),
        sa.PrimaryKeyConstraint("credential", "provider", "base_url", "day", "number", name=op.f("pk_paid_probes")),
        sqlite_with_rowid=False,
    )
