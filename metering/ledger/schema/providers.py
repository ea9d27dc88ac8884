"""What the providers say: of usage and costs, and of rate limits."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, ForeignKey, Integer, String, Table, Text, UniqueConstraint

from metering.events import TOKEN_FIELDS
from metering.ledger.schema.columns import NAME, SERIAL, metadata
from metering.ledger.types import ExactDecimal, UtcDateTime

__all__ = ["paid_probes", "provider_probes", "provider_pulls", "provider_usage", "provider_windows"]

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

provider_probes = Table(
    "provider_probes",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("credential", NAME, nullable=False),
    Column("provider", NAME, nullable=False),
    Column("checked_at", UtcDateTime, nullable=False, index=True),
    Column("reachable", Boolean),
    Column("error", String(64)),
    Column("problem", Text),
    Column("rate_limited", Boolean, nullable=False),
    Column("retry_after_s", ExactDecimal),
    Column("models", Integer, nullable=False),
    Column("sample_model", NAME),
    Column("sample_input_tokens", BigInteger),
    Column("sample_output_tokens", BigInteger),
    Column("sample_latency_ms", BigInteger),
    Column("warnings", Text),
    UniqueConstraint("credential", "provider", "checked_at"),
    # Loaded by a watermark, as events are.
    sqlite_autoincrement=True,
)
"""Each probe of a credential. Append only; nothing of the key.

`error` is the type of what went wrong, `problem` its message, `models` how many were listed, `warnings` what could not
be read, as a JSON list. NULL is what the provider did not say.
"""

provider_windows = Table(
    "provider_windows",
    metadata,
    Column("seq", BigInteger, ForeignKey("provider_probes.seq"), primary_key=True),
    Column("name", NAME, primary_key=True),
    Column("limit_value", ExactDecimal),
    Column("remaining", ExactDecimal),
    Column("percent_used", ExactDecimal),
    Column("reset_at", UtcDateTime),
    sqlite_with_rowid=False,
)
"""The rate-limit windows that a probe found. `reset_at` is by our clock, whatever the provider's says."""

paid_probes = Table(
    "paid_probes",
    metadata,
    Column("credential", NAME, primary_key=True),
    Column("provider", NAME, primary_key=True),
    Column("base_url", String(1000), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("asked_at", UtcDateTime, nullable=False),
    Column("model", NAME, nullable=False),
    Column("input_tokens", BigInteger),
    Column("output_tokens", BigInteger),
    Column("latency_ms", BigInteger),
    Column("cost", ExactDecimal),
    sqlite_with_rowid=False,
)
"""Calls that were made to learn limits, and cost: written before the call, so `number` never passes the day's cap.

`base_url` is where it was asked. Tokens are NULL where the answer told none or never came; `cost` is USD, NULL until
the job `probe-providers` has run, and where no price is known.
"""
