"""Closed periods: what was frozen, and the final documents."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from metering.ledger import types
from metering.ledger.append_only import append_only

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "closes",
        sa.Column("close", serial, nullable=False),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("period_end", types.UtcDateTime(length=27), nullable=False),
        sa.Column("closed_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("override", sa.Text(), nullable=True),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("previous", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["account"], ["accounts.account"], name=op.f("fk_closes_account")),
        sa.PrimaryKeyConstraint("close", name=op.f("pk_closes")),
        sa.UniqueConstraint("account", "period", name=op.f("uq_closes_account_period")),
    )
    op.create_table(
        "frozen_inputs",
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("frozen_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("inputs", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("account", "period", "revision", name=op.f("pk_frozen_inputs")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "issuers",
        sa.Column("issuer", sa.String(length=32), nullable=False),
        sa.Column("last_number", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("issuer", name=op.f("pk_issuers")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "invoices",
        sa.Column("seq", serial, nullable=False),
        sa.Column("issuer", sa.String(length=32), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("names", sa.Text(), nullable=True),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("currency", sa.String(length=3), nullable=False),
        sa.Column("total", types.ExactDecimal(), nullable=False),
        sa.Column("issued_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("actor", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("inputs", sa.Text(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("document_digest", sa.String(length=64), nullable=False),
        sa.Column("csv_digest", sa.String(length=64), nullable=False),
        sa.Column("html_digest", sa.String(length=64), nullable=False),
        sa.Column("previous", sa.String(length=64), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(["issuer"], ["issuers.issuer"], name=op.f("fk_invoices_issuer")),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_invoices")),
        sa.UniqueConstraint("issuer", "number", name=op.f("uq_invoices_issuer_number")),
    )
    op.create_index(op.f("ix_invoices_account"), "invoices", ["account"], unique=False)
    op.create_table(
        "invoice_items",
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("item_id", sa.String(length=255), nullable=False),
        sa.Column("amount", types.ExactDecimal(), nullable=False),
        sa.ForeignKeyConstraint(["seq"], ["invoices.seq"], name=op.f("fk_invoice_items_seq")),
        sa.PrimaryKeyConstraint("seq", "position", name=op.f("pk_invoice_items")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_invoice_items_account"), "invoice_items", ["account"], unique=False)
    for table, *keys in (
        ("closes", ("close",), ("account", "period")),
        ("frozen_inputs", ("account", "period", "revision")),
        ("invoices", ("seq",), ("issuer", "number")),
        ("invoice_items", ("seq", "position")),
    ):
        for statement in append_only(op.get_bind().dialect.name, table, *keys):
            op.get_bind().exec_driver_sql(statement)
