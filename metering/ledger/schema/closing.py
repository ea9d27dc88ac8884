"""Closed periods: what was frozen, and the documents that were made of it."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, ForeignKey, Integer, String, Table, Text, UniqueConstraint

from metering.ledger.schema.columns import NAME, PERIOD, SERIAL, metadata
from metering.ledger.types import ExactDecimal, UtcDateTime

__all__ = ["closes", "frozen_inputs", "invoice_items", "invoices", "issuers"]

DIGEST = String(64)

closes = Table(
    "closes",
    metadata,
    Column("close", SERIAL, primary_key=True),
    Column("account", NAME, ForeignKey("accounts.account"), nullable=False),
    Column("period", PERIOD, nullable=False),
    Column("period_end", UtcDateTime, nullable=False),
    Column("closed_at", UtcDateTime, nullable=False),
    Column("actor", NAME, nullable=False),
    Column("override", Text),
    Column("content", Text, nullable=False),
    Column("previous", DIGEST, nullable=False),
    Column("digest", DIGEST, nullable=False),
    UniqueConstraint("account", "period"),
)
"""Each closed period of an account, once. Append only.

`override` is why it was closed though something spoke against it, NULL where nothing did. `content` is what was frozen,
by digest, as canonical JSON; each row is chained to the one before (`metering.ledger.chains`).
"""

frozen_inputs = Table(
    "frozen_inputs",
    metadata,
    Column("account", NAME, primary_key=True),
    Column("period", PERIOD, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("frozen_at", UtcDateTime, nullable=False),
    Column("digest", DIGEST, nullable=False),
    Column("inputs", Text, nullable=False),
    sqlite_with_rowid=False,
)
"""All that a period's amounts follow from, as canonical JSON. Append only.

Revision 0 is that of the close; each later one has usage that came late, and was billed with another document.
"""

issuers = Table(
    "issuers",
    metadata,
    Column("issuer", String(32), primary_key=True),
    Column("last_number", Integer, nullable=False),
    sqlite_with_rowid=False,
)
"""The last number that each issuer has given. It moves in the transaction that writes the document."""

invoices = Table(
    "invoices",
    metadata,
    Column("seq", SERIAL, primary_key=True),
    Column("issuer", String(32), ForeignKey("issuers.issuer"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("kind", String(16), nullable=False),
    Column("names", Text),
    Column("account", NAME, nullable=False, index=True),
    Column("period", PERIOD, nullable=False),
    Column("currency", String(3), nullable=False),
    Column("total", ExactDecimal, nullable=False),
    Column("issued_at", UtcDateTime, nullable=False),
    Column("actor", NAME, nullable=False),
    Column("reason", Text),
    Column("inputs", Text, nullable=False),
    Column("document", Text, nullable=False),
    Column("document_digest", DIGEST, nullable=False),
    Column("csv_digest", DIGEST, nullable=False),
    Column("html_digest", DIGEST, nullable=False),
    Column("previous", DIGEST, nullable=False),
    Column("digest", DIGEST, nullable=False),
    UniqueConstraint("issuer", "number"),
)
"""Final documents. Append only: one that was wrong is named by a new one.

`kind` is `invoice`, `void` or `credit_note`; `names` the number of the document that the latter two are about; `inputs`
the `frozen_inputs` it was made of, as a JSON list of period and revision; `document` the canonical JSON. Each row, with
its items, is chained to the one before.
"""

invoice_items = Table(
    "invoice_items",
    metadata,
    Column("seq", BigInteger, ForeignKey("invoices.seq"), primary_key=True),
    Column("position", Integer, primary_key=True),
    Column("account", NAME, nullable=False, index=True),
    Column("period", PERIOD, nullable=False),
    Column("item_id", NAME, nullable=False),
    Column("amount", ExactDecimal, nullable=False),
    sqlite_with_rowid=False,
)
"""The items of final documents: what was billed of an account's period so far is the sum of their amounts by item."""
