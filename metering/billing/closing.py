"""Closed periods: what is frozen, what came late, and the documents that follow from both (pure)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING

from metering.billing.invoices import Invoice, InvoiceItem, UsageSum, build_invoice
from metering.billing.money import EXACT, round_money
from metering.billing.tables import written
from metering.errors import InvalidPlan, InvalidSetting
from metering.windows import Window, local_dates

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from metering.plans import Plan

__all__ = ["PeriodInputs", "adjustments", "billed_parts", "composed", "credit_note", "numbered", "voided"]

_TIMES = ("period_start", "period_end", "active_from")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodInputs:
    """All that the amounts of an account's period follow from."""

    account: str
    name: str | None
    address: tuple[str, ...]
    time_zone: str
    active_from: datetime | None
    period: str
    """The month the period starts in, such as `2023-11`."""
    period_start: datetime
    period_end: datetime
    plan_version: int
    """In force at the end of the period."""
    plans: Mapping[int, str]
    """The digest of each plan version that prices any of it."""
    price_versions: tuple[str, ...]
    """Of the price data that costs are by."""
    usage: tuple[UsageSum, ...]
    events: int
    """How many were summed, those included that are not billable."""
    watermark: int
    """How far the ledger was loaded: every event at or below it was there."""
    last_seq: int
    """The highest number of its events."""

    def to_json(self) -> str:
        """Canonical: equal inputs give equal text."""
        document = {name: getattr(self, name) for name in self.__dataclass_fields__}
        document |= {name: value and _utc(value) for name in _TIMES for value in (document[name],)}
        document["plans"] = {str(version): digest for version, digest in self.plans.items()}
        document["usage"] = [
            {
                name: written(value) if isinstance(value, Decimal) else value
                for name in row.__dataclass_fields__
                for value in (getattr(row, name),)
            }
            for row in self.usage
        ]
        return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> PeriodInputs:
        """The inputs of which `text` is the `to_json`. Raises `InvalidSetting` for anything else."""
        try:
            given = json.loads(text)
            given |= {name: given[name] and datetime.fromisoformat(given[name]) for name in _TIMES}
            given |= {name: tuple(given[name]) for name in ("address", "price_versions")}
            given["plans"] = {int(version): digest for version, digest in given["plans"].items()}
            given["usage"] = tuple(
                UsageSum(**{**row, **{name: Decimal(row[name]) for name in ("quantity", "cost")}})
                for row in given["usage"]
            )
            return cls(**given)
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as exc:
            raise InvalidSetting("inputs", text[:40], "what PeriodInputs.to_json wrote") from exc

    @property
    def digest(self) -> str:
        """SHA-256 of `to_json`, as 64 hex digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def with_usage(
        self,
        usage: Iterable[UsageSum],
        *,
        plans: Mapping[int, str],
        price_versions: Sequence[str],
        events: int,
        watermark: int,
        last_seq: int,
    ) -> PeriodInputs:
        """The same period with all usage that is known of it now."""
        return replace(
            self,
            usage=tuple(usage),
            plans={**self.plans, **plans},
            price_versions=tuple(sorted({*self.price_versions, *price_versions})),
            events=events,
            watermark=watermark,
            last_seq=last_seq,
        )


def composed(
    inputs: PeriodInputs,
    late: Sequence[PeriodInputs],
    plans: Mapping[int, Plan],
    billed: Mapping[str, Mapping[str, Decimal]],
) -> tuple[Invoice, ...]:
    """The drafts of an account's period: its invoice, with the adjustments that `late` closed periods come to.

    `billed` is what final documents say, by period and item. An adjustment in another currency than the period's is on
    a document of its own, since one has one currency. A document that would say nothing is left out. Raises what
    `build_invoice` raises, and `InvalidPlan` where a plan is not the one that was frozen.
    """
    draft = _priced(inputs, plans)
    more: dict[str, list[InvoiceItem]] = {draft.currency: []}
    for period in sorted(late, key=lambda each: each.period):
        currency, items = adjustments(period, plans, billed.get(period.period, {}))
        more.setdefault(currency, []).extend(items)
    own = _with_items(draft, (*draft.items, *more.pop(draft.currency)), draft.currency)
    others = [
        replace(_of_items(draft, items, currency), reference=f"{draft.reference}-{currency}")
        for currency, items in sorted(more.items())
        if items
    ]
    return (*([own] if own.usage or own.items else []), *others)


def adjustments(
    inputs: PeriodInputs, plans: Mapping[int, Plan], billed: Mapping[str, Decimal]
) -> tuple[str, tuple[InvoiceItem, ...]]:
    """The currency of a closed period, and what it comes to now less what was `billed` of it, item by item.

    Each amount is that of all usage so far, rounded once, less the signed sum of what final documents said: so cents
    carry, and the documents of a period add up to its price. Empty where nothing changes.
    """
    whole = _priced(inputs, plans)
    now = {item.item_id: item for item in whole.items}
    items = []
    with localcontext(EXACT):
        for item_id in (*now, *sorted(billed.keys() - now.keys())):
            already = billed.get(item_id, Decimal(0))
            item = now.get(item_id) or _no_longer_due(item_id, inputs, whole.currency)
            if item.amount != already:
                items.append(
                    replace(
                        item,
                        item_id=f"{inputs.period}/{item_id}",
                        description=f"{inputs.period}: {item.description}",
                        period=inputs.period,
                        already_billed=round_money(already, whole.currency),
                        amount=round_money(item.amount - already, whole.currency),
                    )
                )
    return whole.currency, tuple(items)


def numbered(draft: Invoice, number: str, issued_at: datetime) -> Invoice:
    """The final document that a draft becomes, issued on the account's local date."""
    issued_on, _ = local_dates(Window(start=issued_at, end=issued_at), draft.time_zone)
    return replace(draft, status="final", number=number, issued_on=issued_on)


def voided(invoice: Invoice) -> Invoice:
    """The draft of what takes all of a final document back, and names it."""
    items = tuple(
        replace(
            item,
            item_id=f"{invoice.period}/{item.item_id}" if item.period is None else item.item_id,
            period=item.period or invoice.period,
            exact_amount=-item.exact_amount,
            amount=round_money(-item.amount, invoice.currency),
            already_billed=None,
        )
        for item in invoice.items
    )
    return replace(_of_items(invoice, items, invoice.currency), kind="void", names=invoice.number)


def credit_note(
    invoice: Invoice, inputs: PeriodInputs, plans: Mapping[int, Plan], billed: Mapping[str, Decimal]
) -> Invoice:
    """The draft of what gives back at once what was billed too much of an invoice's period, and names the invoice.

    It has all that the period comes to now less what was billed, so nothing is left for a later one. Its total is 0 or
    above where nothing was billed too much.
    """
    currency, items = adjustments(inputs, plans, billed)
    return replace(_of_items(invoice, items, currency), kind="credit_note", names=invoice.number)


def billed_parts(invoice: Invoice) -> list[tuple[str, str, Decimal]]:
    """Period, item and amount of each item, as `billed` adds them up."""
    return [
        (invoice.period, item.item_id, item.amount)
        if item.period is None
        else (item.period, item.item_id.removeprefix(f"{item.period}/"), item.amount)
        for item in invoice.items
    ]


def _priced(inputs: PeriodInputs, plans: Mapping[int, Plan]) -> Invoice:
    for version, digest in inputs.plans.items():
        if version not in plans or plans[version].digest != digest:
            raise InvalidPlan("plans", f"plan version {version} is not the one that {inputs.period} was priced with")
    return build_invoice(
        account=inputs.account,
        name=inputs.name,
        address=inputs.address,
        plans=plans,
        plan_version=inputs.plan_version,
        period=inputs.period,
        period_start=inputs.period_start,
        period_end=inputs.period_end,
        time_zone=inputs.time_zone,
        usage=inputs.usage,
        active_from=inputs.active_from,
    )


def _with_items(invoice: Invoice, items: Sequence[InvoiceItem], currency: str) -> Invoice:
    with localcontext(EXACT):
        total = round_money(sum((item.amount for item in items), Decimal(0)), currency)
    return replace(invoice, status="draft", number=None, items=tuple(items), currency=currency, total=total)


def _of_items(invoice: Invoice, items: Sequence[InvoiceItem], currency: str) -> Invoice:
    """A document of an invoice's account and period without usage of its own."""
    return replace(
        _with_items(invoice, items, currency),
        usage=(),
        requests=0,
        input_tokens=0,
        output_tokens=0,
        provider_cost=Decimal(0),
        unpriced_requests=0,
    )


def _no_longer_due(item_id: str, inputs: PeriodInputs, currency: str) -> InvoiceItem:
    return InvoiceItem(
        item_id=item_id,
        description=f"{item_id} is no longer due",
        line=None,
        metric=None,
        quantity=None,
        plan_version=inputs.plan_version,
        rate=None,
        exact_amount=Decimal(0),
        amount=round_money(Decimal(0), currency),
    )


def _utc(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
