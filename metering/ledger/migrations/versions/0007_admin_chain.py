"""The admin log as a chain: each entry carries a digest over the one before, and none can be changed or deleted."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from metering.ledger.append_only import append_only
from metering.ledger.chains import EMPTY, digest_of

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    chains = op.create_table(
        "chains",
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("length", sa.BigInteger(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_chains")),
        sqlite_with_rowid=False,
    )
    added = ("previous", "digest")
    with op.batch_alter_table("admin_log") as batch:
        for name in added:
            batch.add_column(sa.Column(name, sa.String(length=64), nullable=True))
    connection = op.get_bind()
    found = connection.exec_driver_sql(
        "SELECT entry, logged_at, actor, action, subject, details FROM admin_log ORDER BY entry"
    ).all()
    previous, chained = EMPTY.digest, []
    for row in found:
        # On Postgres too a time is read as the text that SQLite keeps.
        digest = digest_of(previous, (str(value).encode() for value in row))
        chained.append({"of": row[0], "previous": previous, "digest": digest})
        previous = digest
    if chained:
        chain_row = sa.text("UPDATE admin_log SET previous = :previous, digest = :digest WHERE entry = :of")
        connection.execute(chain_row, chained)
        connection.execute(chains.insert().values(name="admin_log", length=len(chained), digest=previous))
    with op.batch_alter_table("admin_log") as batch:
        for name in added:
            batch.alter_column(name, existing_type=sa.String(length=64), nullable=False)
    for statement in append_only(connection.dialect.name, "admin_log", ("entry",)):
        connection.exec_driver_sql(statement)
