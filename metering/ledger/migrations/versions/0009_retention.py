"""Retention: when a row of the request log goes, legal holds, and archives of events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from metering.ledger import types

revision = "0009"
down_revision = "0008"

# By the plan in force when it was logged. An account always has one; should it not, its rows stay the longest.
_RETENTION_DAYS = """
coalesce((
    SELECT r.retention_days FROM plan_versions AS v JOIN plan_retention AS r ON r.plan_version = v.plan_version
    WHERE v.effective_from <= old.logged_at AND v.plan = (
        SELECT p.plan FROM account_plans AS p
        WHERE p.account = old.account AND p.effective_from <= old.logged_at
        ORDER BY p.effective_from DESC LIMIT 1
    )
    ORDER BY v.effective_from DESC, v.version DESC LIMIT 1
), 365)
"""
_EXPIRES_AT = {
    "sqlite": f"date(substr(old.logged_at, 1, 10), '+' || {_RETENTION_DAYS} || ' days') || substr(old.logged_at, 11)",
    "postgresql": f"old.logged_at + make_interval(days => {_RETENTION_DAYS})",
}
_COLUMNS = (
    "log_id, event_id, hold_id, account, key_id, line, operation, logged_at, request, response, error, latency_ms"
)


def upgrade() -> None:
    op.create_table(
        "legal_holds",
        sa.Column("legal_hold", sa.Integer(), nullable=False),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("placed_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("placed_by", sa.String(length=255), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("released_at", types.UtcDateTime(length=27), nullable=True),
        sa.Column("released_by", sa.String(length=255), nullable=True),
        sa.ForeignKeyConstraint(["account"], ["accounts.account"], name=op.f("fk_legal_holds_account")),
        sa.PrimaryKeyConstraint("legal_hold", name=op.f("pk_legal_holds")),
    )
    op.create_index(
        "uq_legal_holds_in_force",
        "legal_holds",
        ["account"],
        unique=True,
        sqlite_where=sa.text("released_at IS NULL"),
        postgresql_where=sa.text("released_at IS NULL"),
    )
    op.create_table(
        "archives",
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("period", sa.String(length=7), nullable=False),
        sa.Column("part", sa.Integer(), nullable=False),
        sa.Column("made_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("file", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("events", sa.BigInteger(), nullable=False),
        sa.Column("seq_to", sa.BigInteger(), nullable=False),
        sa.Column("first_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("last_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("manifest", sa.Text(), nullable=False),
        sa.Column("deleted_at", types.UtcDateTime(length=27), nullable=True),
        sa.ForeignKeyConstraint(["account"], ["accounts.account"], name=op.f("fk_archives_account")),
        sa.PrimaryKeyConstraint("account", "period", "part", name=op.f("pk_archives")),
        sqlite_with_rowid=False,
    )
    _renew_request_log(op.get_bind().dialect.name)


def _renew_request_log(dialect: str) -> None:
    """The table is written anew, because neither a key nor partitions can be given to one that is there."""
    is_on_postgres = dialect == "postgresql"
    op.drop_index("ix_request_log_account_logged_at", "request_log")
    op.drop_index("ix_request_log_key_id_logged_at", "request_log")
    op.rename_table("request_log", "request_log_before")
    if is_on_postgres:
        op.execute("ALTER INDEX pk_request_log RENAME TO pk_request_log_before")
        op.execute("ALTER SEQUENCE request_log_log_id_seq RENAME TO request_log_before_seq")
    serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "request_log",
        sa.Column("log_id", serial, nullable=False, autoincrement=True),
        sa.Column("event_id", sa.Uuid(), nullable=True),
        sa.Column("hold_id", sa.Uuid(), nullable=True),
        sa.Column("account", sa.String(length=255), nullable=False),
        sa.Column("key_id", sa.String(length=36), nullable=True),
        sa.Column("line", sa.String(length=64), nullable=False),
        sa.Column("operation", sa.String(length=255), nullable=True),
        sa.Column("logged_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("expires_at", types.UtcDateTime(length=27), nullable=False),
        sa.Column("request", sa.Text(), nullable=True),
        sa.Column("response", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("latency_ms", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("log_id", *["expires_at"] * is_on_postgres, name=op.f("pk_request_log")),
        postgresql_partition_by="RANGE (expires_at)",
    )
    _remember_retention()
    if is_on_postgres:
        _make_partitions()
    op.execute(
        f"INSERT INTO request_log ({_COLUMNS}, expires_at) "
        f"SELECT {_COLUMNS}, {_EXPIRES_AT[dialect]} FROM request_log_before AS old ORDER BY log_id"
    )
    op.drop_table("request_log_before")
    op.drop_table("plan_retention")
    if is_on_postgres:
        op.execute(
            "SELECT setval('request_log_log_id_seq', greatest((SELECT max(log_id) FROM request_log), 1), "
            "EXISTS (SELECT 1 FROM request_log))"
        )
    op.create_index(op.f("ix_request_log_account_logged_at"), "request_log", ["account", "logged_at"], unique=False)
    op.create_index(op.f("ix_request_log_key_id_logged_at"), "request_log", ["key_id", "logged_at"], unique=False)
    op.create_index(op.f("ix_request_log_expires_at"), "request_log", ["expires_at"], unique=False)


def _remember_retention() -> None:
    """What each version of a plan says of its request log."""
    op.create_table(
        "plan_retention",
        sa.Column("plan_version", sa.Integer(), primary_key=True),
        sa.Column("retention_days", sa.Integer(), nullable=False),
    )
    days = {"sqlite": "json_extract(document, '$.retention_days')", "postgresql": "document::json ->> 'retention_days'"}
    op.execute(
        "INSERT INTO plan_retention (plan_version, retention_days) "
        f"SELECT plan_version, CAST({days[op.get_bind().dialect.name]} AS INTEGER) FROM plan_versions"
    )


def _make_partitions() -> None:
    """One for each UTC day on which a row goes that is there, and one for what has no other."""
    op.execute("CREATE TABLE request_log_default PARTITION OF request_log DEFAULT")
    days = op.get_bind().execute(
        sa.text(
            f"SELECT DISTINCT to_char({_EXPIRES_AT['postgresql']}, 'YYYYMMDD'), "
            f"to_char({_EXPIRES_AT['postgresql']}, 'YYYY-MM-DD'), "
            f"to_char({_EXPIRES_AT['postgresql']} + interval '1 day', 'YYYY-MM-DD') "
            "FROM request_log_before AS old"
        )
    )
    for name, start, end in days.all():
        op.execute(
            f"CREATE TABLE request_log_{name} PARTITION OF request_log "
            f"FOR VALUES FROM ('{start} 00:00:00+00') TO ('{end} 00:00:00+00')"
        )
