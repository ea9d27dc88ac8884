"""The tables of the ledger, the database of record. `migrations/` builds exactly this; a test compares the two."""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, MetaData, PrimaryKeyConstraint, Table, text

from metering.ledger.schema.calls import (
    account_plans,
    accounts,
    admin_log,
    api_keys,
    chains,
    counters,
    event_ids,
    events,
    holds,
    ledger_info,
    outbox,
    plan_versions,
    rate_counters,
    replays,
    request_log,
)
from metering.ledger.schema.closing import closes, frozen_inputs, invoice_items, invoices, issuers
from metering.ledger.schema.columns import metadata
from metering.ledger.schema.providers import (
    paid_probes,
    provider_probes,
    provider_pulls,
    provider_usage,
    provider_windows,
)
from metering.ledger.schema.reconciling import event_costs, reconciliations, recosts, replaced_costs, spans, verdicts
from metering.ledger.schema.redis import dead_letters, key_reuses, shards
from metering.ledger.schema.retaining import archives, legal_holds
from metering.ledger.types import UtcDateTime, Uuid

__all__ = [
    "account_plans",
    "accounts",
    "admin_log",
    "api_keys",
    "archives",
    "chains",
    "closes",
    "counters",
    "dead_letters",
    "event_costs",
    "event_ids",
    "events",
    "frozen_inputs",
    "holds",
    "invoice_items",
    "invoices",
    "issuers",
    "key_reuses",
    "ledger_info",
    "legal_holds",
    "metadata",
    "metadata_on_postgres",
    "outbox",
    "paid_probes",
    "plan_versions",
    "provider_probes",
    "provider_pulls",
    "provider_usage",
    "provider_windows",
    "rate_counters",
    "reconciliations",
    "recosts",
    "replaced_costs",
    "replays",
    "request_log",
    "shards",
    "spans",
    "verdicts",
]


def metadata_on_postgres() -> MetaData:
    """The tables as they lie on Postgres, where what is loaded also says which transaction wrote it.

    There a `seq` is handed out before its transaction commits, so a load that remembers the highest it has seen skips
    whatever commits later with a lower one. `commit_xid` below `pg_snapshot_xmin` is in every later snapshot.
    """
    on_postgres = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(on_postgres)
    current_xid = text("(pg_current_xact_id()::text)::bigint")
    for name in ("events", "spans", "provider_probes"):
        on_postgres.tables[name].append_column(
            Column("commit_xid", BigInteger, nullable=False, index=True, server_default=current_xid)
        )
    # Cut by it, so it is a part of the key.
    partitioned = on_postgres.tables["request_log"]
    partitioned.c.expires_at.primary_key = True
    partitioned.append_constraint(PrimaryKeyConstraint("log_id", "expires_at"))
    partitioned.dialect_options["postgresql"]["partition_by"] = "RANGE (expires_at)"
    # What each writer has committed last: where the answer to a commit is lost it is read there. The number of a
    # transaction does not tell, because a server that crashed may give it to another one.
    Table(
        "writer_commits",
        on_postgres,
        Column("writer", Uuid, primary_key=True),
        Column("mark", Uuid, nullable=False),
        Column("marked_at", UtcDateTime, nullable=False),
    )
    return on_postgres
