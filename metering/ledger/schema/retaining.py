"""What is kept longer than it would be, and what has left the ledger for an archive."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Index, Integer, String, Table, Text, text

from metering.ledger.schema.columns import NAME, PERIOD, metadata
from metering.ledger.types import UtcDateTime

__all__ = ["archives", "legal_holds"]

legal_holds = Table(
    "legal_holds",
    metadata,
    Column("legal_hold", Integer, primary_key=True),
    Column("account", NAME, ForeignKey("accounts.account"), nullable=False),
    Column("placed_at", UtcDateTime, nullable=False),
    Column("placed_by", NAME, nullable=False),
    Column("reason", Text, nullable=False),
    Column("released_at", UtcDateTime),
    Column("released_by", NAME),
    # One at a time, and the only ones that are looked for.
    Index(
        "uq_legal_holds_in_force",
        "account",
        unique=True,
        sqlite_where=text("released_at IS NULL"),
        postgresql_where=text("released_at IS NULL"),
    ),
)
"""Nothing of an account is deleted or erased while it has one that is not released. No quota: those are `holds`."""

archives = Table(
    "archives",
    metadata,
    Column("account", NAME, ForeignKey("accounts.account"), primary_key=True),
    Column("period", PERIOD, primary_key=True),
    Column("part", Integer, primary_key=True),
    Column("made_at", UtcDateTime, nullable=False),
    Column("file", Text, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("events", BigInteger, nullable=False),
    Column("seq_to", BigInteger, nullable=False),
    Column("first_at", UtcDateTime, nullable=False),
    Column("last_at", UtcDateTime, nullable=False),
    Column("manifest", Text, nullable=False),
    Column("deleted_at", UtcDateTime),
    sqlite_with_rowid=False,
)
"""Files with the events of a closed period of an account, each verified before its row was written.

What came late, and was billed, is in a further `part`. `file` is relative to the folder of the archives, `digest` its
SHA-256, `manifest` the JSON beside it; events in it occurred from `first_at` to `last_at`, and `seq_to` is the highest
of their numbers. `deleted_at` is when the last of them had left `events`.
"""
