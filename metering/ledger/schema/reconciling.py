"""What events cost, what was traced, and what came of comparing."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    String,
    Table,
    Text,
    UniqueConstraint,
)

from metering.events import TOKEN_FIELDS
from metering.ledger.schema.columns import NAME, PERIOD, POSITION, SERIAL, metadata
from metering.ledger.types import ExactDecimal, UtcDateTime

__all__ = ["event_costs", "reconciliations", "recosts", "replaced_costs", "spans", "verdicts"]

event_costs = Table(
    "event_costs",
    metadata,
    Column("seq", SERIAL, primary_key=True, autoincrement=False),
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

spans = Table(
    "spans",
    metadata,
    Column("seq", SERIAL, primary_key=True),
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
