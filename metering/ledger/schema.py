"""The tables of the ledger, the database of record. `migrations/` builds exactly this; a test compares the two."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from metering.events import TOKEN_FIELDS
from metering.ledger.types import ExactDecimal, UtcDateTime, Uuid, WholeNumber

__all__ = [
    "account_plans",
    "accounts",
    "admin_log",
    "api_keys",
    "counters",
    "dead_letters",
    "event_costs",
    "event_ids",
    "events",
    "holds",
    "key_reuses",
    "ledger_info",
    "metadata",
    "metadata_on_postgres",
    "outbox",
    "plan_versions",
    "provider_pulls",
    "provider_usage",
    "rate_counters",
    "reconciliations",
    "recosts",
    "replaced_costs",
    "replays",
    "request_log",
    "shards",
    "spans",
    "verdicts",
]

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

NAME = String(255)
LINE = String(64)
PERIOD = String(7)
POSITION = String(80)
_SERIAL = BigInteger().with_variant(Integer(), "sqlite")

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
    Column("seq", _SERIAL, primary_key=True),
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

event_costs = Table(
    "event_costs",
    metadata,
    Column("seq", _SERIAL, primary_key=True, autoincrement=False),
    Column("cost", ExactDecimal),
    Column("price_version", String(64), nullable=False),
    Column("costed_at", UtcDateTime, nullable=False),
)
"""What the provider charges for an event, in USD; `cost` is NULL where no price is known."""

recosts = Table(
    "recosts",
    metadata,
    Column("recost", Integer, primary_key=True),
    Column("made_at", UtcDateTime, nullable=False),
    Column("actor", NAME, nullable=False),
    Column("reason", Text, nullable=False),
    Column("period", PERIOD, nullable=False),
    Column("price_version", String(64), nullable=False),
    Column("ended", Boolean, nullable=False),
)
"""Each act of costing a period's events anew, by other prices than they were costed with; `ended` once all are."""

replaced_costs = Table(
    "replaced_costs",
    metadata,
    Column("recost", Integer, ForeignKey("recosts.recost"), primary_key=True),
    Column("seq", BigInteger, primary_key=True),
    Column("cost", ExactDecimal),
    Column("price_version", String(64), nullable=False),
    Column("costed_at", UtcDateTime, nullable=False),
    sqlite_with_rowid=False,
)
"""The row of `event_costs` that a recost replaced."""

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
    Column("log_id", _SERIAL, primary_key=True),
    Column("event_id", Uuid),
    Column("hold_id", Uuid),
    Column("account", NAME, nullable=False),
    Column("key_id", String(36)),
    Column("line", LINE, nullable=False),
    Column("operation", NAME),
    Column("logged_at", UtcDateTime, nullable=False),
    Column("request", Text),
    Column("response", Text),
    Column("error", Text),
    Column("latency_ms", Integer),
    Index(None, "account", "logged_at"),
    Index(None, "key_id", "logged_at"),
)

admin_log = Table(
    "admin_log",
    metadata,
    Column("entry", Integer, primary_key=True),
    Column("logged_at", UtcDateTime, nullable=False),
    Column("actor", NAME, nullable=False),
    Column("action", NAME, nullable=False),
    Column("subject", NAME, nullable=False),
    Column("details", Text, nullable=False),
)

outbox = Table(
    "outbox",
    metadata,
    Column("seq", _SERIAL, primary_key=True),
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

shards = Table(
    "shards",
    metadata,
    Column("shard", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("lost", BigInteger, nullable=False),
    Column("drained_at", UtcDateTime),
)
"""How far each shard of Redis is drained: the highest sequence number of its epoch, and how many were never seen."""

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("dead_letter_id", Integer, primary_key=True),
    Column("position", POSITION, nullable=False, unique=True),
    Column("shard", Integer, nullable=False),
    Column("noticed_at", UtcDateTime, nullable=False),
    Column("error", Text, nullable=False),
    Column("header", LargeBinary, nullable=False),
    Column("body", LargeBinary, nullable=False),
    Column("account", NAME),
    Column("period", PERIOD),
    Column("resolved_at", UtcDateTime),
)
"""What stood in Redis and could not be billed as it was, byte for byte. Open until somebody resolves it."""

key_reuses = Table(
    "key_reuses",
    metadata,
    Column("position", POSITION, primary_key=True),
    Column("account", NAME, nullable=False),
    Column("event_id", Uuid, nullable=False, index=True),
    Column("billed_as", Uuid),
    Column("noticed_at", UtcDateTime, nullable=False),
    sqlite_with_rowid=False,
)
"""An idempotency key used again after Redis had forgotten it: for the same request it is not billed again, and
`billed_as` is NULL; for another one it is billed as a fact of its own.
"""

spans = Table(
    "spans",
    metadata,
    Column("seq", _SERIAL, primary_key=True),
    Column("trace_id", NAME, nullable=False),
    Column("span_id", NAME, nullable=False),
    Column("parent_span_id", NAME),
    Column("run_id", NAME, nullable=False, index=True),
    Column("account", NAME),
    Column("name", NAME, nullable=False),
    Column("convention", String(16)),
    *(Column(name, BigInteger, nullable=False) for name in TOKEN_FIELDS),
    Column("provider", NAME),
    Column("model", NAME),
    Column("started_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    Column("recorded_at", UtcDateTime, nullable=False),
    Column("flags", Text),
    UniqueConstraint("trace_id", "span_id"),
    # Loaded by a watermark, as events are.
    sqlite_autoincrement=True,
)
"""What was traced: each span that says what it used, and the spans above it. Append only; no text of any call.

`convention` is NULL where a span says nothing of tokens; `flags` is what is odd about what it says, with commas.
"""

reconciliations = Table(
    "reconciliations",
    metadata,
    Column("reconciliation", Integer, primary_key=True),
    Column("period", PERIOD, nullable=False),
    Column("made_at", UtcDateTime, nullable=False),
    Column("events_to", BigInteger, nullable=False),
    Column("spans_to", BigInteger, nullable=False),
    Column("tolerance_tokens", Integer, nullable=False),
    Column("tolerance_percent", ExactDecimal, nullable=False),
    Column("runs", Text, nullable=False),
    Column("stakes", Text, nullable=False),
)
"""Each comparison of a period's billed runs with the traced ones: of what was loaded up to two watermarks.

`runs` is how many runs of each account got which verdict, and `stakes` what their corrections come to together, both
as JSON; runs that agree have no row in `verdicts`.
"""

verdicts = Table(
    "verdicts",
    metadata,
    Column("reconciliation", Integer, ForeignKey("reconciliations.reconciliation"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("account", NAME),
    Column("run_id", NAME, nullable=False),
    Column("verdict", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("state", POSITION, nullable=False),
    Column("amount", ExactDecimal),
    Column("currency", String(3)),
    Column("cost", ExactDecimal),
    Column("evidence", Text, nullable=False),
    Column("corrections", Text, nullable=False),
    Column("applied_at", UtcDateTime),
    Column("applied_by", NAME),
    Index(None, "account", "run_id"),
    sqlite_with_rowid=False,
)
"""Runs that do not agree. `state` tells how much was recorded of the run when it was judged, `evidence` is what was
compared and `corrections` what is proposed, both as JSON; `amount` and `cost` are the money at stake.
"""

provider_usage = Table(
    "provider_usage",
    metadata,
    Column("provider", NAME, primary_key=True),
    Column("organization", NAME, primary_key=True),
    Column("report", String(16), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("dimensions", String(1000), primary_key=True),
    Column("model", NAME),
    Column("requests", BigInteger),
    *(Column(name, BigInteger) for name in TOKEN_FIELDS),
    Column("cost", ExactDecimal),
    sqlite_with_rowid=False,
)
"""What a provider reports of one UTC day: a row for each combination of what it is grouped by, `dimensions` as JSON.

`report` is `usage`, `embeddings` or `cost`; `cost` is in USD. NULL is what the provider does not say.
"""

provider_pulls = Table(
    "provider_pulls",
    metadata,
    Column("provider", NAME, primary_key=True),
    Column("organization", NAME, primary_key=True),
    Column("report", String(16), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("pulled_at", UtcDateTime, nullable=False),
    Column("provisional", Boolean, nullable=False),
    sqlite_with_rowid=False,
)
"""Which UTC days of a provider's report are in `provider_usage`, each whole; a provisional one may still change."""


def metadata_on_postgres() -> MetaData:
    """The tables as they lie on Postgres, where events and spans also say which transaction wrote them.

    There a `seq` is handed out before its transaction commits, so a load that remembers the highest it has seen skips
    whatever commits later with a lower one. `commit_xid` below `pg_snapshot_xmin` is in every later snapshot.
    """
    on_postgres = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(on_postgres)
    current_xid = text("(pg_current_xact_id()::text)::bigint")
    for name in ("events", "spans"):
        on_postgres.tables[name].append_column(
            Column("commit_xid", BigInteger, nullable=False, index=True, server_default=current_xid)
        )
    # What each writer has committed last: where the answer to a commit is lost it is read there. The number of a
    # transaction does not tell, because a server that crashed may give it to another one.
    Table(
        "writer_commits",
        on_postgres,
        Column("writer", Uuid, primary_key=True),
        Column("mark", Uuid, nullable=False),
        Column("marked_at", UtcDateTime, nullable=False),
    )
    return on_postgres
