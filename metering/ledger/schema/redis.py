"""Where quotas are on Redis: how far its shards were drained, and what could not be."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Integer, LargeBinary, Table, Text

from metering.ledger.schema.columns import NAME, PERIOD, POSITION, metadata
from metering.ledger.types import UtcDateTime, Uuid

__all__ = ["dead_letters", "key_reuses", "shards"]

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
