"""Reconciliation: verdicts on runs, what providers report, costs that a recost replaced, events and spans by run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from metering.ledger import types

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_index(
        "ix_events_run",
        "events",
        ["run_id", "account"],
        unique=False,
        sqlite_where=sa.text("run_id IS NOT NULL"),
        postgresql_where=sa.text("run_id IS NOT NULL"),
    )
    op.create_index(op.f("ix_spans_run_id"), "spans", ["run_id"], unique=False)
    op.create_table(
        "recosts",
        sa.Column("recost", sa.Integer(), nullable=False),
        sa.Column("made_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("price_version", sa.String(length=64), nullable=False),
        sa.Column("ended", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("recost", name=op.f("pk_recosts")),
    )
    op.create_table(
        "replaced_costs",
        sa.Column("recost", sa.Integer(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("cost", types.ExactDecimal(), nullable=True),
        sa.Column("price_version", sa.String(length=64), nullable=False),
        sa.Column("costed_at", types.UtcDateTime(length=27), nullable=False),
        sa.ForeignKeyConstraint(["recost"], ["recosts.recost"], name=op.f("fk_replaced_costs_recost")),
        sa.PrimaryKeyConstraint("recost", "seq", name=op.f("pk_replaced_costs")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "reconciliations",
        sa.Column("reconciliation", sa.Integer(), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("made_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("events_to", sa.BigInteger(), nullable=False),
        sa.Column("spans_to", sa.BigInteger(), nullable=False),
        sa.Column("tolerance_tokens", sa.Integer(), nullable=False),
        sa.Column("tolerance_percent", types.ExactDecimal(), nullable=False),
        sa.Column("runs", sa.Text(), nullable=False),
        sa.Column("stakes", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("reconciliation", name=op.f("pk_reconciliations")),
    )
    op.create_table(
        "verdicts",
        sa.Column("reconciliation", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=True),
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("verdict", sa.String(length=16), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=80), nullable=False),
        sa.Column("amount", types.ExactDecimal(), nullable=True),
        sa.Column("currency", sa.String(length=3), nullable=True),
        sa.Column("cost", types.ExactDecimal(), nullable=True),
        sa.Column("evidence", sa.Text(), nullable=False),
        sa.Column("corrections", sa.Text(), nullable=False),
        sa.Column("applied_at", types.UtcDateTime(length=27), nullable=True),
        sa.Column("applied_by", sa.String(length=255), nullable=True),
        sa.ForeignKeyConstraint(
            ["reconciliation"], ["reconciliations.reconciliation"], name=op.f("fk_verdicts_reconciliation")
        ),
        sa.PrimaryKeyConstraint("reconciliation", "number", name=op.f("pk_verdicts")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_verdicts_account_run_id"), "verdicts", ["account", "run_id"], unique=False)
    op.create_table(
        "provider_usage",
        sa.Column("provider", sa.String(length=255), nullable=False),
        sa.Column("organization", sa.String(length=255), nullable=False),
        sa.Column("report", sa.String(length=16), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("dimensions", sa.String(length=1000), nullable=False),
        sa.Column("model", sa.String(length=255), nullable=True),
        sa.Column("requests", sa.BigInteger(), nullable=True),
        sa.Column("input_tokens", sa.BigInteger(), nullable=True),
        sa.Column("cache_read_tokens", sa.BigInteger(), nullable=True),
        sa.Column("cache_write_tokens", sa.BigInteger(), nullable=True),
        sa.Column("cache_write_1h_tokens", sa.BigInteger(), nullable=True),
        sa.Column("input_audio_tokens", sa.BigInteger(), nullable=True),
        sa.Column("output_tokens", sa.BigInteger(), nullable=True),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=True),
        sa.Column("output_audio_tokens", sa.BigInteger(), nullable=True),
        sa.Column("cost", types.ExactDecimal(), nullable=True),
        sa.PrimaryKeyConstraint(
            "provider", "organization", "report", "day", "dimensions", name=op.f("pk_provider_usage")
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "provider_pulls",
        sa.Column("provider", sa.String(length=255), nullable=False),
        sa.Column("organization", sa.String(length=255), nullable=False),
        sa.Column("report", sa.String(length=16), nullable=False),
        sa.Column("day", sa.String(length=10), nullable=False),
        sa.Column("pulled_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("provisional", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("provider", "organization", "report", "day", name=op.f("pk_provider_pulls")),
        sqlite_with_rowid=False,
    )
