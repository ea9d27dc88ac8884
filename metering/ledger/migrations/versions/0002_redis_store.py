"""What the Redis store needs of the ledger: outbox, shards, dead letters, reused keys, positions."""

from __future__ import annotations

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

from metering.ledger import types

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "dead_letters",
        sa.Column("dead_letter_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.String(length=80), nullable=False),
        sa.Column("shard", sa.Integer(), nullable=False),
        sa.Column("noticed_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("header", sa.LargeBinary(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=True),
        sa.Column("period", sa.String(length=7), nullable=True),
        sa.Column("resolved_at", types.UtcDateTime(length=27), nullable=True),
        sa.PrimaryKeyConstraint("dead_letter_id", name=op.f("pk_dead_letters")),
        sa.UniqueConstraint("position", name=op.f("uq_dead_letters_position")),
    )
    op.create_table(
        "key_reuses",
        sa.Column("position", sa.String(length=80), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("event_id", sa.Uuid(), nullable=False),
        sa.Column("billed_as", sa.Uuid(), nullable=True),
        sa.Column("noticed_at", types.UtcDateTime(length=27), nullable=False),
        sa.PrimaryKeyConstraint("position", name=op.f("pk_key_reuses")),
        sqlite_with_rowid=False,
    )
    op.create_index(op.f("ix_key_reuses_event_id"), "key_reuses", ["event_id"], unique=False)
    outbox = op.create_table(
        "outbox",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=True),
        sa.Column("recount", sa.Boolean(), nullable=False),
        sa.Column("created_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("sent_at", types.UtcDateTime(length=27), nullable=True),
        sa.PrimaryKeyConstraint("seq", name=op.f("pk_outbox")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_outbox_account_seq"), "outbox", ["account", "seq"], unique=False)
    op.create_index(
        "ix_outbox_unsent",
        "outbox",
        ["seq"],
        unique=False,
        sqlite_where=sa.text("sent_at IS NULL"),
        postgresql_where=sa.text("sent_at IS NULL"),
    )
    op.create_table(
        "shards",
        sa.Column("shard", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("lost", sa.BigInteger(), nullable=False),
        sa.Column("drained_at", types.UtcDateTime(length=27), nullable=True),
        sa.PrimaryKeyConstraint("shard", name=op.f("pk_shards")),
    )
    op.add_column("event_ids", sa.Column("position", sa.String(length=80), nullable=True))
    # Accounts that were there before have a version, too. Nobody has an older copy to be told about it.
    assert outbox is not None
    if op.get_bind().execute(sa.text("SELECT 1 FROM accounts LIMIT 1")).first() is not None:
        now = datetime.now(UTC)
        op.bulk_insert(outbox, [{"account": None, "recount": False, "created_at": now, "sent_at": now}])
