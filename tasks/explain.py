"""What is behind an item of a final document: its events, down to the keys that apps gave them."""

from __future__ import annotations

import csv
import io
from contextlib import closing
from dataclasses import dataclass
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any

import msgspec

from metering.billing.invoices import UsageSum
from metering.billing.money import EXACT
from metering.billing.rating import claims, metric_of
from metering.errors import InvoiceConflict
from metering.ledger import Ledger
from metering.ledger.closing import document, frozen_inputs_of, later_events
from reports.formats import cell
from tasks.periods import plans_of
from tasks.warehouse import open_for_reading, sql

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from uuid import UUID

    from metering.billing.closing import PeriodInputs
    from metering.billing.invoices import InvoiceItem
    from metering.plans import Plan

__all__ = ["Explained", "ItemEvent", "explain_item"]

_GROUP = ("plan_version", "line", "provider", "model", "service_tier")


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemEvent:
    """One event, and what it adds."""

    event_id: UUID
    kind: str
    corrects: UUID | None
    occurred_at: str
    recorded_at: str
    idempotency_key: str | None
    key_id: str | None
    run_id: str | None
    line: str
    model: str | None
    quantity: Decimal
    """In the item's metric; USD of provider cost for `cost_plus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """An item, and all of its events."""

    item: InvoiceItem
    period: str
    events: list[ItemEvent]

    @property
    def quantity(self) -> Decimal:
        """What the events add up to: the item's quantity."""
        with localcontext(EXACT):
            return sum((event.quantity for event in self.events), Decimal(0))

    def lines(self, *, as_json: bool) -> Iterator[str]:
        """The events as lines of CSV under their names, or each as an object of JSON."""
        names = tuple(ItemEvent.__dataclass_fields__)
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="")
        if not as_json:
            yield ",".join(names)
        for event in self.events:
            said = {name: getattr(event, name) for name in names} | {"quantity": f"{event.quantity:f}"}
            if as_json:
                yield msgspec.json.encode(said).decode()
            else:
                writer.writerow([cell(None if value is None else str(value)) for value in said.values()])
                yield out.getvalue()
                out.seek(0)
                out.truncate()


def explain_item(ledger_url: str, warehouse: Path, number: str, item_id: str) -> Explained:
    """The events that an item of a final document bills, by when they occurred.

    Of an adjustment, all events of its period, as they were known then. Raises `UnknownInvoice`, and `InvoiceConflict`
    for an item that is not there, or is for no usage, or whose events are not all there.
    """
    with closing(Ledger(ledger_url)) as ledger, ledger.read() as connection:
        found = document(connection, number)
        if found.kind == "void":
            raise InvoiceConflict(number, f"is a void: explain the same item of {found.names}")
        item = next((each for each in found.invoice.items if each.item_id == item_id), None)
        if item is None:
            known = ", ".join(each.item_id for each in found.invoice.items)
            raise InvoiceConflict(number, f"has no item {item_id!r}, only {known}")
        if item.quantity is None or item.metric is None:
            raise InvoiceConflict(number, f"item {item_id} is a fixed amount: no event is behind it")
        period = item.period or found.period
        revision = next(revision for of, revision in found.inputs if of == period)
        inputs = frozen_inputs_of(connection, found, period, revision)
        index = int(item_id.rpartition("/")[2])
        groups = _groups(inputs, plans_of(connection), item, index)
        later = later_events(connection, inputs)
    explained = Explained(
        item=item,
        period=period,
        events=list(_events(warehouse, inputs, groups, later, item.metric)),
    )
    if explained.quantity != item.quantity:
        raise InvoiceConflict(
            number,
            f"item {item_id} bills {item.quantity:f}, but the events of the warehouse come to {explained.quantity:f}",
        )
    return explained


def _groups(inputs: PeriodInputs, plans: dict[int, Plan], item: InvoiceItem, index: int) -> set[tuple[Any, ...]]:
    """What a rate claims, by all that it can tell apart."""
    rows = [row for row in inputs.usage if row.plan_version == item.plan_version]
    return {
        tuple(getattr(row, name) for name in _GROUP)
        for row in rows
        for claim in claims(plans[item.plan_version], [row])
        if claim.index == index and (claim.quantity or claim.unpriced_requests)
    }


def _events(
    warehouse: Path, inputs: PeriodInputs, groups: set[tuple[Any, ...]], later: set[int], metric: str
) -> Iterator[ItemEvent]:
    with open_for_reading(warehouse) as connection:
        found = connection.execute(sql("item_events"), {"account": inputs.account, "period": inputs.period})
        names = [column[0] for column in found.description or ()]
        while batch := found.fetchmany(10_000):
            for values in batch:
                row = dict(zip(names, values, strict=True))
                if row["seq"] in later or tuple(row[name] for name in _GROUP) not in groups:
                    continue
                yield ItemEvent(
                    **{name: row[name] for name in ItemEvent.__dataclass_fields__ if name != "quantity"},
                    quantity=metric_of(_usage(row), metric),
                )


def _usage(row: dict[str, Any]) -> UsageSum:
    """One event as rates see it."""
    known = {name: row[name] for name in UsageSum.__dataclass_fields__ if name in row}
    return UsageSum(**{**known, "cost": row["cost"] or Decimal(0)})
