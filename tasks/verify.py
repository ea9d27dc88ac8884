"""Proofs after the fact: what was derived is computed again, another way, and compared."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from contextlib import closing
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.billing.invoices import UsageSum
from metering.billing.money import EXACT
from metering.errors import MeteringError
from metering.events import TOKEN_FIELDS
from metering.ledger import Ledger
from metering.ledger.closing import document, documents_of, frozen_of
from metering.ledger.proving import chain_faults, recomputed
from metering.ledger.schema import archives, events
from metering.settings import Settings
from tasks.archives import archived_sums, changed_archives
from tasks.bills import build_bills, invoice_files
from tasks.periods import Loaded, late_of, loaded
from tasks.warehouse import open_for_reading, sql

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "archive_differences",
    "close_differences",
    "document_differences",
    "invoice_differences",
    "rollup_differences",
]

GROUP = ("plan_version", "line", "provider", "model", "service_tier")


def rollup_differences(ledger_url: str, warehouse: Path, period: str, archived: Path | None = None) -> list[str]:
    """Where the warehouse's rollup of a period is not what the ledger's events add up to; empty if nowhere.

    Those in `archived` are counted too, a folder that the settings name unless it is said.
    """
    with open_for_reading(warehouse) as connection:
        rolled_up = loaded(connection, period).usage
    recorded = _ledger_sums(ledger_url, period, archived)
    return [
        f"{account}: the ledger has {_shown(recorded.get(account))}, the rollup {_shown(rolled_up.get(account))}"
        for account in sorted(recorded.keys() | rolled_up.keys())
        if sorted(recorded.get(account, []), key=repr) != sorted(rolled_up.get(account, []), key=repr)
    ]


def invoice_differences(ledger_url: str, out: Path, period: str, archived: Path | None = None) -> list[str]:
    """Which invoice files of a period are not, byte for byte, what the ledger's events come to; empty if none."""
    folder = out / period / "invoices"
    expected: dict[str, bytes] = {}
    known = Loaded(usage=_ledger_sums(ledger_url, period, archived))
    with closing(Ledger(ledger_url)) as ledger, ledger.read() as connection:
        late = late_of(
            connection, _counts(connection), lambda month: Loaded(usage=_ledger_sums(ledger_url, month, archived))
        )
        finals = [each.invoice for each in documents_of(connection, period=period)]
        for invoice in (*finals, *build_bills(connection, known, period, late).invoices):
            expected |= invoice_files(invoice)
    found = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
    differences = [f"{name}: is missing" for name in sorted(expected.keys() - found.keys())]
    differences += [f"{name}: bills nothing that is in the ledger" for name in sorted(found.keys() - expected.keys())]
    differences += [
        f"{name}: differs from what the ledger comes to"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    return differences


def document_differences(ledger_url: str, out: Path, number: str) -> list[str]:
    """Where a final document is not what was issued; empty if nowhere. Raises `UnknownInvoice`.

    Its canonical JSON is computed again from what was frozen, and compared byte for byte; its files by their digests.
    """
    with closing(Ledger(ledger_url)) as ledger, ledger.read() as connection:
        found = document(connection, number)
        differences = []
        if _digest(found.document) != found.document_digest:
            differences.append(f"{number}: the document in the ledger has changed")
        try:
            if recomputed(connection, found) != found.document:
                differences.append(f"{number}: what was frozen comes to another document")
        except MeteringError as exc:
            differences.append(f"{number}: cannot be computed again: {exc}")
    folder = out / found.period / "invoices"
    for kind, digest in (("json", found.document_digest), ("csv", found.csv_digest), ("html", found.html_digest)):
        path = folder / f"{number}.{kind}"
        if not path.exists():
            differences.append(f"{path}: is missing: `python -m flows bill-period --period {found.period}` writes it")
        elif _digest(path.read_bytes()) != digest:
            differences.append(f"{path}: is not the file that was issued")
    return differences


def close_differences(ledger_url: str) -> list[str]:
    """Which closes, or what they froze, are not what was written; empty if none."""
    with closing(Ledger(ledger_url)) as ledger, ledger.read() as connection:
        return chain_faults(connection)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def archive_differences(ledger_url: str, archived: Path) -> list[str]:
    """Which archives are no longer what was archived, each by its file; empty if none."""
    ledger = Ledger(ledger_url)
    try:
        return changed_archives(ledger, archived)
    finally:
        ledger.close()


def _ledger_sums(ledger_url: str, period: str, archived: Path | None) -> dict[str, list[UsageSum]]:
    """Billable usage of a period by account, of events in the ledger and of those that have left it."""
    sums: defaultdict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    folder = archived or Settings.from_env().archives
    ledger = Ledger(ledger_url)
    try:
        with ledger.read() as connection:
            rows = archived_sums(connection, folder, period)
            query = sql("ledger_sums")
            if ledger.dialect == "postgresql":
                query = query.replace("exact_sum(", "sum(")  # which is exact there
            rows += [dict(row) for row in connection.execute(sa.text(query), {"period": period}).mappings()]
    finally:
        ledger.close()
    for values in rows:
        values |= {name: Decimal(values[name]) for name in ("quantity", "cost")}
        values |= {name: int(values[name]) for name in (*TOKEN_FIELDS, "requests", "unpriced_requests")}
        sums[tuple(values.pop(name) for name in ("account", *GROUP))].append(values)
    found: defaultdict[str, list[UsageSum]] = defaultdict(list)
    for (account, *group), parts in sums.items():
        with localcontext(EXACT):
            amounts = {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}
        found[account].append(UsageSum(**dict(zip(GROUP, group, strict=True)), **amounts))
    return found


def _counts(connection: sa.Connection) -> Counter[tuple[str, str]]:
    """How many events of each account's closed period there are, in the ledger and in archives."""
    closed = {period for periods in frozen_of(connection).values() for period in periods}
    counted: Counter[tuple[str, str]] = Counter()
    for table, count in ((events, sa.func.count()), (archives, sa.func.sum(archives.c.events))):
        query = sa.select(table.c.account, table.c.period, count).where(table.c.period.in_(closed))
        for account, period, number in connection.execute(query.group_by(table.c.account, table.c.period)):
            counted[account, period] += int(number)
    return counted


def _shown(sums: list[UsageSum] | None) -> str:
    if not sums:
        return "nothing"
    requests = sum(row.requests for row in sums)
    tokens = sum(row.input_tokens + row.output_tokens for row in sums)
    return f"{requests} requests and {tokens} tokens in {len(sums)} groups"
