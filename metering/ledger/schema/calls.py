"""What a call needs, and what it leaves: accounts and keys, events, counters, holds, replays, the logs."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from metering.events import TOKEN_FIELDS
from metering.ledger.schema.columns import LINE, NAME, PERIOD, POSITION, SERIAL, metadata
from metering.ledger.types import ExactDecimal, UtcDateTime, Uuid, WholeNumber

__all__ = [
    "account_plans",
    "accounts",
    "admin_log",
    "api_keys",
    "chains",
    "counters",
    "event_ids",
    "events",
    "holds",
    "ledger_info",
    "outbox",
    "plan_versions",
    "rate_counters",
    "replays",
    "request_log",
]

ledger_info = Table(
    "ledger_info",
    metadata,
    Column("ledger_id", Uuid, primary_key=True),
    Column("created_at", UtcDateTime, nullable=False),
)
"""One row: which ledger this is, so that a warehouse knows when it is shown another."""

plan_versions = Table(
    "plan_versions",
    metadata,
    Column("plan_version", Integer, primary_key=True),
    Column("plan", NAME, nullable=False),
    Column("version", Integer, nullable=False),
    Column("effective_from", UtcDateTime, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("document", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("plan", "version"),
    Index(None, "plan", "effective_from"),
)

accounts = Table(
    "accounts",
    metadata,
    Column("account", NAME, primary_key=True),
    Column("name", Text),
    Column("address", Text),
    Column("time_zone", String(64), nullable=False),
    Column("anchor_day", Integer, nullable=False),
    Column("active_from", UtcDateTime),
    Column("created_at", UtcDateTime, nullable=False),
    CheckConstraint("anchor_day BETWEEN 1 AND 31", name="anchor_day"),
)

account_plans = Table(
    "account_plans",
    metadata,
    Column("account", NAME, ForeignKey("accounts.account"), primary_key=True),
    Column("effective_from", UtcDateTime, primary_key=True),
    Column("plan", NAME, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("key_id", String(36), primary_key=True),
    Column("account", NAME, ForeignKey("accounts.account"), nullable=False, index=True),
    Column("digest", String(64), nullable=False, unique=True),
    Column("prefix", String(16), nullable=False),
    Column("last_four", String(4), nullable=False),
    Column("label", NAME),
    Column("created_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime),
    Column("revoked_at", UtcDateTime),
    Column("last_used_at", UtcDateTime),
    Column("rotated_to", String(36)),
)

events = Table(
    "events",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("event_id", Uuid, nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("corrects", Uuid, index=True),
    Column("account", NAME, nullable=False),
    Column("key_id", String(36)),
    Column("plan_version", Integer, nullable=False),
    Column("line", LINE, nullable=False),
    Column("operation", NAME),
    Column("caller_type", String(32), nullable=False),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("recorded_at", UtcDateTime, nullable=False),
    Column("period", PERIOD, nullable=False),
    Column("requests", Integer, nullable=False),
    *(Column(name, BigInteger, nullable=False) for name in TOKEN_FIELDS),
    Column("quantity", ExactDecimal, nullable=False),
    Column("provider", NAME),
    Column("model", NAME),
    Column("service_tier", NAME),
    Column("run_id", NAME),
    Column("request_id", NAME),
    Column("session_id", NAME),
    Column("attributes", Text),
    Column("platform_paid", Boolean, nullable=False),
    Column("billable", Boolean, nullable=False),
    Column("estimated", Boolean, nullable=False),
    Column("counted", Boolean, nullable=False),
    Column("late", Boolean, nullable=False),
    Column("error", Text),
    Column("latency_ms", Integer),
    Column("idempotency_key", NAME),
    Column("fingerprint", String(255)),
    Column("source", NAME),
    Column("reason", Text),
    Index(None, "account", "occurred_at"),
    Index(
        "ix_events_run",
        "run_id",
        "account",
        sqlite_where=text("run_id IS NOT NULL"),
        postgresql_where=text("run_id IS NOT NULL"),
    ),
    # Without AUTOINCREMENT a deleted top id is used again, below the watermark of the load.
    sqlite_autoincrement=True,
)
"""Append only. A reversal holds the original's numbers negated, so sums need no case for it."""

event_ids = Table(
    "event_ids",
    metadata,
    Column("event_id", Uuid, primary_key=True),
    Column("period", PERIOD, nullable=False),
    Column("fingerprint", String(255)),
    Column("position", POSITION),
    sqlite_with_rowid=False,
)
"""Every id ever billed. Never trimmed, also when the event itself has been archived.

`position` is where the event stood in Redis, as `SHARD/EPOCH/STREAM ID`; NULL for one that came another way.
"""

counters = Table(
    "counters",
    metadata,
    Column("account", NAME, primary_key=True),
    Column("window_start", UtcDateTime, primary_key=True),
    Column("window_end", UtcDateTime, primary_key=True),
    Column("metric", String(32), primary_key=True),
    Column("line", LINE, primary_key=True),
    Column("key_id", String(36), primary_key=True),
    Column("used", ExactDecimal, nullable=False),
    sqlite_with_rowid=False,
)
"""A cache of sums over counted `events` and open holds: a row that is missing is counted anew from them.

`line` is `*` for all lines, `key_id` is empty for all keys of the account.
"""

rate_counters = Table(
    "rate_counters",
    metadata,
    Column("account", NAME, primary_key=True),
    Column("metric", String(32), primary_key=True),
    Column("line", LINE, primary_key=True),
    Column("key_id", String(36), primary_key=True),
    Column("units", Integer, primary_key=True),
    Column("period_us", BigInteger, primary_key=True),
    Column("arrival", WholeNumber, nullable=False),
    sqlite_with_rowid=False,
)
"""GCRA for `units` per `period_us`: the theoretical arrival time in microseconds, times `units` so that it is whole."""

holds = Table(
    "holds",
    metadata,
    Column("hold_id", Uuid, primary_key=True),
    Column("event_id", Uuid, nullable=False),
    Column("account", NAME, nullable=False),
    Column("key_id", String(36)),
    Column("line", LINE, nullable=False),
    Column("run_id", NAME),
    Column("fingerprint", String(255)),
    Column("state", String(16), nullable=False),
    Column("admitted_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
    Column("reserved", Text, nullable=False),
    Column("rate_claims", Text, nullable=False),
    Column("settlement", String(64)),
    Column("settled_event_id", Uuid),
    CheckConstraint("state IN ('open', 'settled', 'released', 'expired')", name="state"),
    Index(
        "ix_holds_open",
        "account",
        "expires_at",
        sqlite_where=text("state = 'open'"),
        postgresql_where=text("state = 'open'"),
    ),
    Index(
        "uq_holds_in_flight",
        "event_id",
        unique=True,
        sqlite_where=text("state = 'open'"),
        postgresql_where=text("state = 'open'"),
    ),
)

replays = Table(
    "replays",
    metadata,
    Column("event_id", Uuid, primary_key=True),
    Column("response", Text, nullable=False),
    Column("stored_at", UtcDateTime, nullable=False, index=True),
    sqlite_with_rowid=False,
)

request_log = Table(
    "request_log",
    metadata,
    Column("log_id", SERIAL, primary_key=True),
    Column("event_id", Uuid),
    Column("hold_id", Uuid),
    Column("account", NAME, nullable=False),
    Column("key_id", String(36)),
    Column("line", LINE, nullable=False),
    Column("operation", NAME),
    Column("logged_at", UtcDateTime, nullable=False),
    Column("expires_at", UtcDateTime, nullable=False, index=True),
    Column("request", Text),
    Column("response", Text),
    Column("error", Text),
    Column("latency_ms", Integer),
    Index(None, "account", "logged_at"),
    Index(None, "key_id", "logged_at"),
)
"""Bodies, errors and latencies of calls. `expires_at` is by the plan in force when it was logged, whatever later ones
say; the row goes then, whole. On Postgres in partitions of a UTC day of it: see `metering.ledger.log_partitions`.
"""

admin_log = Table(
    "admin_log",
    metadata,
    Column("entry", Integer, primary_key=True),
    Column("logged_at", UtcDateTime, nullable=False),
    Column("actor", NAME, nullable=False),
    Column("action", NAME, nullable=False),
    Column("subject", NAME, nullable=False),
    Column("details", Text, nullable=False),
    Column("previous", String(64), nullable=False),
    Column("digest", String(64), nullable=False),
)
"""Who changed what. Append only, by triggers; `previous` and `digest` chain each entry to the one before."""

chains = Table(
    "chains",
    metadata,
    Column("name", NAME, primary_key=True),
    Column("length", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
    sqlite_with_rowid=False,
)
"""The head of each chain of rows: how many there are, and the digest of the newest. None yet: no row."""

outbox = Table(
    "outbox",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("account", NAME),
    Column("recount", Boolean, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("sent_at", UtcDateTime),
    Index(None, "account", "seq"),
    Index(
        "ix_outbox_unsent",
        "seq",
        sqlite_where=text("sent_at IS NULL"),
        postgresql_where=text("sent_at IS NULL"),
    ),
    # A number used again would be a version that copies of the account have already.
    sqlite_autoincrement=True,
)
"""What Redis is to be told: this account (NULL: each) has changed, and `recount` its counters.

The highest number that names an account is its version: a copy that is older is stale. So sent rows stay.
"""
