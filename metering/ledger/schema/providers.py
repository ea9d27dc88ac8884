"""What the providers say: of usage and costs."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, Column, String, Table

from metering.events import TOKEN_FIELDS
from metering.ledger.schema.columns import NAME, metadata
from metering.ledger.types import ExactDecimal, UtcDateTime

__all__ = ["provider_pulls", "provider_usage"]

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
