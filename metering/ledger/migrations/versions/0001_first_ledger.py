"""The first ledger: accounts, keys, plans, events, holds, counters, logs."""

from __future__ import annotations

from datetime import UTC, datetime
from uuid import uuid4

import sqlalchemy as sa
from alembic import op

from metering.ledger import types

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "accounts",
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("name", sa.Text(), nullable=True),
        sa.Column("address", sa.Text(), nullable=True),
        sa.Column("time_zone", sa.String(length=64), nullable=False),
        sa.Column("anchor_day", sa.Integer(), nullable=False),
        sa.Column("active_from", types.UtcDateTime(length=27), nullable=True),
        sa.Column("created_at", types.UtcDateTime(length=27), nullable=False),
        sa.CheckConstraint("anchor_day BETWEEN 1 AND 31", name=op.f("ck_accounts_anchor_day")),
        sa.PrimaryKeyConstraint("account", name=op.f("pk_accounts")),
    )
    op.create_table(
        "admin_log",
        sa.Column("entry", sa.Integer(), nullable=False),
        sa.Column("logged_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("action", sa.String(length=255), nullable=False),
        sa.Column("subject", sa.String(length=255), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("entry", name=op.f("pk_admin_log")),
    )
    op.create_table(
        "counters",
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("window_start", types.UtcDateTime(length=27), nullable=False),
        sa.Column("window_end", types.UtcDateTime(length=27), nullable=False),
        sa.Column("metric", sa.String(length=32), nullable=False),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.Column("used", types.ExactDecimal(), nullable=False),
        sa.PrimaryKeyConstraint(
            "account", "window_start", "window_end", "metric", "line", "key_id", name=op.f("pk_counters")
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "event_costs",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=False, nullable=False),
        sa.Column("cost", types.ExactDecimal(), nullable=True),
        sa.Column("price_version", sa.String(length=64), nullable=False),
        sa.Column("costed_at", types.UtcDateTime(length=27), nullable=False),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_event_costs")),
    )
    op.create_table(
        "event_ids",
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("fingerprint", sa.String(length=255), nullable=True),
        sa.PrimaryKeyConstraint("event_id", name=op.f("pk_event_ids")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "events",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("corrects", sa.Uuid(), nullable=True),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=True),
        sa.Column("plan_version", sa.Integer(), nullable=False),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("operation", sa.String(length=255), nullable=True),
        sa.Column("caller_type", sa.String(length=32), nullable=False),
        sa.Column("occurred_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("recorded_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("requests", sa.Integer(), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_read_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_write_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cache_write_1h_tokens", sa.BigInteger(), nullable=False),
        sa.Column("input_audio_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), nullable=False),
        sa.Column("output_audio_tokens", sa.BigInteger(), nullable=False),
        sa.Column("quantity", types.ExactDecimal(), nullable=False),
        sa.Column("provider", sa.String(length=255), nullable=True),
        sa.Column("model", sa.String(length=255), nullable=True),
        sa.Column("service_tier", sa.String(length=255), nullable=True),
        sa.Column("run_id", sa.String(length=255), nullable=True),
        sa.Column("request_id", sa.String(length=255), nullable=True),
        sa.Column("session_id", sa.String(length=255), nullable=True),
        sa.Column("attributes", sa.Text(), nullable=True),
        sa.Column("platform_paid", sa.Boolean(), nullable=False),
        sa.Column("billable", sa.Boolean(), nullable=False),
        sa.Column("estimated", sa.Boolean(), nullable=False),
        sa.Column("counted", sa.Boolean(), nullable=False),
        sa.Column("late", sa.Boolean(), nullable=False),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("latency_ms", sa.Integer(), nullable=True),
        sa.Column("idempotency_key", sa.String(length=255), nullable=True),
        sa.Column("fingerprint", sa.String(length=255), nullable=True),
        sa.Column("source", sa.String(length=255), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_events")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_events_account_occurred_at"), "events", ["account", "occurred_at"], unique=False)
    op.create_index(op.f("ix_events_corrects"), "events", ["corrects"], unique=False)
    op.create_index(op.f("ix_events_event_id"), "events", ["event_id"], unique=False)
    op.create_table(
        "holds",
        sa.Column("hold_id", sa.Uuid(), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=True),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("run_id", sa.String(length=255), nullable=True),
        sa.Column("fingerprint", sa.String(length=255), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("admitted_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("expires_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("reserved", sa.Text(), nullable=False),
        sa.Column("rate_claims", sa.Text(), nullable=False),
        sa.Column("settlement", sa.String(length=64), nullable=True),
        sa.Column("settled_event_id", sa.Uuid(), nullable=True),
        sa.CheckConstraint("state IN ('open', 'settled', 'released', 'expired')", name=op.f("ck_holds_state")),
        sa.PrimaryKeyConstraint("hold_id", name=op.f("pk_holds")),
    )
    op.create_index(
        "ix_holds_open",
        "holds",
        ["account", "expires_at"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "uq_holds_in_flight",
        "holds",
        ["event_id"],
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    ledger_info = op.create_table(
        "ledger_info",
        sa.Column("ledger_id", sa.Uuid(), nullable=False),
        sa.Column("created_at", types.UtcDateTime(length=27), nullable=False),
        sa.PrimaryKeyConstraint("ledger_id", name=op.f("pk_ledger_info")),
    )
    assert ledger_info is not None
    op.bulk_insert(ledger_info, [{"ledger_id": uuid4(), "created_at": datetime.now(UTC)}])
    op.create_table(
        "plan_versions",
        sa.Column("plan_version", sa.Integer(), nullable=False),
        sa.Column("plan", sa.String(length=255), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("effective_from", types.UtcDateTime(length=27), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("created_at", types.UtcDateTime(length=27), nullable=False),
        sa.PrimaryKeyConstraint("plan_version", name=op.f("pk_plan_versions")),
        sa.UniqueConstraint("plan", "version", name=op.f("uq_plan_versions_plan_version")),
    )
    op.create_index(
        op.f("ix_plan_versions_plan_effective_from"), "plan_versions", ["plan", "effective_from"], unique=False
    )
    op.create_table(
        "rate_counters",
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("metric", sa.String(length=32), nullable=False),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.Column("units", sa.Integer(), nullable=False),
        sa.Column("period_us", sa.BigInteger(), nullable=False),
        sa.Column("arrival", types.WholeNumber(), nullable=False),
        sa.PrimaryKeyConstraint(
            "account", "metric", "line", "key_id", "units", "period_us", name=op.f("pk_rate_counters")
        ),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "replays",
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("response", sa.Text(), nullable=False),
        sa.Column("stored_at", types.UtcDateTime(length=27), nullable=False),
        sa.PrimaryKeyConstraint("event_id", name=op.f("pk_replays")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_replays_stored_at"), "replays", ["stored_at"], unique=False)
    op.create_table(
        "request_log",
        sa.Column("log_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=True),
        sa.Column("hold_id", sa.Uuid(), nullable=True),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=True),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("operation", sa.String(length=255), nullable=True),
        sa.Column("logged_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("request", sa.Text(), nullable=True),
        sa.Column("response", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("latency_ms", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("log_id", name=op.f("pk_request_log")),
    )
    op.create_index(op.f("ix_request_log_account_logged_at"), "request_log", ["account", "logged_at"], unique=False)
    op.create_index(op.f("ix_request_log_key_id_logged_at"), "request_log", ["key_id", "logged_at"], unique=False)
    op.create_table(
        "account_plans",
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("effective_from", types.UtcDateTime(length=27), nullable=False),
        sa.Column("plan", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.account"], name=op.f("fk_account_plans_account")),
        sa.PrimaryKeyConstraint("account", "effective_from", name=op.f("pk_account_plans")),
    )
    op.create_table(
        "api_keys",
        sa.Column("key_id", sa.String(length=36), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("prefix", sa.String(length=16), nullable=False),
        sa.Column("last_four", sa.String(length=4), nullable=False),
        sa.Column("label", sa.String(length=255), nullable=True),
        sa.Column("created_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("expires_at", types.UtcDateTime(length=27), nullable=True),
        sa.Column("revoked_at", types.UtcDateTime(length=27), nullable=True),
        sa.Column("last_used_at", types.UtcDateTime(length=27), nullable=True),
        sa.Column("rotated_to", sa.String(length=36), nullable=True),
        sa.ForeignKeyConstraint(["account"], ["accounts.account"], name=op.f("fk_api_keys_account")),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
    )
    op.create_index(op.f("ix_api_keys_account"), "api_keys", ["account"], unique=False)
