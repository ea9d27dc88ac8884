"""Which item of an invoice a fact is part of, and how far it has come there."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from metering.billing.invoices import Invoice, UsageSum
from metering.billing.money import EXACT
from metering.billing.rating import claims
from metering.errors import MeteringError
from metering.ledger import plan_versions
from metering.ledger.closing import documents_of, frozen_of, later_events
from metering.ledger.schema import accounts
from metering.windows import period_of_month

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from metering.history.ledger import EventRow

__all__ = ["Bill", "Document", "Item", "bills_of"]

LATE = "it came after its period was closed: it is on the account's next invoice"

_GROUP = ("plan_version", "line", "provider", "model", "service_tier")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What a fact adds to one item."""

    item_id: str
    """As in the invoice: `v{plan_version}/rates/{index}`."""
    description: str
    line: str | None
    metric: str | None
    quantity: Decimal
    """Of this fact, corrections included; USD of provider cost for `cost_plus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The final document of a closed period, or a draft that is there."""

    file: str
    """Of a final one its number."""
    reference: str
    status: str
    written_at: datetime
    total: str
    """With the currency."""
    items: tuple[str, ...]
    """Those of `Bill.items` that it has, with the quantity and amount of all usage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """Where a fact is billed."""

    period: str
    """The month in which the billing period starts."""
    period_start: datetime
    period_end: datetime
    """The first instant that is no longer billed."""
    items: tuple[Item, ...]
    """Empty where nothing is billed for it."""
    document: Document | None
    says: str
    """How far it has come."""


def bills_of(connection: sa.Connection, account: str, events: Sequence[EventRow], out: Path) -> tuple[Bill, ...]:
    """A bill for each period that events are in. `out` is the folder of drafts on this machine."""
    by_period: defaultdict[str, list[EventRow]] = defaultdict(list)
    for event in events:
        by_period[event.period].append(event)
    if not by_period:
        return ()
    zone = connection.execute(
        sa.select(accounts.c.time_zone, accounts.c.anchor_day).where(accounts.c.account == account)
    ).one()
    bills = []
    for period, rows in sorted(by_period.items()):
        window = period_of_month(period, time_zone=zone.time_zone, anchor_day=zone.anchor_day)
        sums = _sums(rows)
        problem = None
        items: list[Item] = []
        try:
            items = list(_items(connection, sums))
        except MeteringError as exc:
            problem = str(exc)
        wanted = {item.item_id for item in items}
        closed, waits = _closed(connection, account, period, rows, wanted)
        document = closed or _draft(out, account, period, wanted)
        bills.append(
            Bill(
                period=period,
                period_start=window.start,
                period_end=window.end,
                items=tuple(items),
                document=document,
                says=problem or waits or _says(rows, sums, items, document, out),
            )
        )
    return tuple(bills)


def _sums(rows: Sequence[EventRow]) -> list[UsageSum]:
    """What is billed for them, as an invoice sums it; a correction may have taken all of a group back."""
    groups: defaultdict[tuple[Any, ...], Any] = defaultdict(Counter)
    with localcontext(EXACT):
        for row in rows:
            if row.billable:
                is_unpriced = row.costed_at is not None and row.cost is None
                more: dict[str, Any] = {
                    "requests": row.requests,
                    "quantity": row.quantity,
                    "cost": row.cost or Decimal(0),
                }
                more |= row.tokens | {"unpriced_requests": row.requests * is_unpriced}
                groups[tuple(getattr(row, name) for name in _GROUP)].update(more)
    return [
        UsageSum(**dict(zip(_GROUP, group, strict=True)), **total)
        for group, total in groups.items()
        if any(total.values())
    ]


def _items(connection: sa.Connection, sums: list[UsageSum]) -> Iterator[Item]:
    plans = {version.plan_version: version.plan for version in plan_versions.versions(connection)} if sums else {}
    for number in sorted({row.plan_version for row in sums}):
        for claim in claims(plans[number], [row for row in sums if row.plan_version == number]):
            if claim.quantity or claim.unpriced_requests:
                yield Item(
                    item_id=f"v{number}/rates/{claim.index}",
                    description=str(claim.rate),
                    line=claim.rate.line,
                    metric=claim.rate.metric,
                    quantity=claim.quantity,
                )


def _closed(
    connection: sa.Connection, account: str, period: str, rows: Sequence[EventRow], wanted: set[str]
) -> tuple[Document | None, str | None]:
    """The newest final document that bills a closed period, and what is still to be billed of these events."""
    frozen = frozen_of(connection, account).get(account, {})
    if period not in frozen:
        return None, None
    later = later_events(connection, frozen[period][1])
    documents = documents_of(connection, account=account)
    voided = {each.names for each in documents if each.kind == "void"}
    for found in reversed(documents):
        invoice = found.invoice
        if found.kind == "invoice" and period in (found.period, *(item.period for item in invoice.items)):
            document = _as_document(invoice, period, found.number, found.number, found.issued_at, wanted)
            if found.number in voided:
                return document, f"{found.number} was voided: it is on the account's next invoice"
            return document, LATE if any(row.seq in later for row in rows) else None
    return None, LATE if any(row.seq in later for row in rows) else None


def _draft(out: Path, account: str, period: str, wanted: set[str]) -> Document | None:
    reference = f"{account}-{period}"
    named = json.dumps(reference, ensure_ascii=False).encode()
    for path in sorted((out / period / "invoices").glob("*.json")):
        try:
            content, written_at = path.read_bytes(), datetime.fromtimestamp(path.stat().st_mtime, UTC)
        except FileNotFoundError:
            continue  # another run of the job has taken it away
        if named not in content:
            continue
        invoice = Invoice.from_json(content)
        if invoice.reference == reference:
            return _as_document(invoice, period, str(path), reference, written_at, wanted)
    return None


def _as_document(
    invoice: Invoice, period: str, file: str, reference: str, written_at: datetime, wanted: set[str]
) -> Document:
    return Document(
        file=file,
        reference=reference,
        status=invoice.status,
        written_at=written_at,
        total=f"{invoice.total:f} {invoice.currency}",
        items=tuple(
            f"{item.item_id}: {item.quantity:f} for {item.amount:f} {invoice.currency}"
            for item in invoice.items
            if (item.period or invoice.period) == period
            and item.item_id.rpartition(f"{period}/")[2] in wanted
            and item.quantity is not None
        ),
    )


def _says(
    rows: Sequence[EventRow], sums: list[UsageSum], items: list[Item], document: Document | None, out: Path
) -> str:
    period = rows[0].period
    job = f"`python -m flows bill-period --period {period}`"
    costed = [row.costed_at for row in rows if row.costed_at is not None]
    if not any(row.billable for row in rows):
        return "nothing is billed for it: no event of it is billable"
    if len(costed) < len(rows):
        return "not billed yet: `python -m flows aggregate-usage` has not seen all of it"
    if document is None:
        return f"not billed yet: there is no draft in {out / period}; {job} writes it"
    if document.status == "draft" and document.written_at < max(costed):
        return f"not billed as it stands: the draft is older; {job} renews it"
    adds = "" if items else ": it was taken back, and adds nothing" if not sums else ": no rate of its plan counts it"
    return f"in {document.reference} ({document.status}){adds}"
