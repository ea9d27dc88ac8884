"""What an invoice says, and how it follows from a period's usage."""

from __future__ import annotations

import json
from dataclasses import asdict, astuple, dataclass
from datetime import UTC, date, datetime
from decimal import Decimal, localcontext
from typing import TYPE_CHECKING, Any, Literal

from metering.billing.money import EXACT, quotient, round_money
from metering.billing.rating import Claim, claims
from metering.billing.tables import written
from metering.errors import InvalidPlan, InvalidSetting, UnpricedUsage
from metering.windows import Window, local_dates

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from metering.billing.pricing import Rate
    from metering.plans import Plan

__all__ = ["Invoice", "InvoiceItem", "UsageSum", "build_invoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageSum:
    """Billable usage of one account in one period, summed over what a rate can tell apart."""

    plan_version: int
    line: str
    provider: str | None
    model: str | None
    service_tier: str | None
    requests: int
    quantity: Decimal
    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    cache_write_1h_tokens: int = 0
    input_audio_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    output_audio_tokens: int = 0
    cost: Decimal
    """What the provider charges for it, in USD, as far as prices are known."""
    unpriced_requests: int = 0
    """Requests whose provider cost is not known, so not in `cost`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceItem:
    """One row of an invoice."""

    item_id: str
    """Stable within the invoice: `base_fee`, `minimum`, or `v{plan_version}/rates/{index}`."""
    description: str
    line: str | None
    metric: str | None
    quantity: Decimal | None
    """Units billed; None for fixed amounts."""
    plan_version: int
    rate: dict[str, Any] | None
    """The rate as applied, in the form of plans.toml; None for the base fee and the plan's minimum."""
    exact_amount: Decimal
    amount: Decimal
    """`exact_amount` rounded once, half away from zero, to the currency's minor unit, less `already_billed`."""
    period: str | None = None
    """Of an adjustment: the closed period it is for, with which `item_id` then begins; None for the invoice's own."""
    already_billed: Decimal | None = None
    """Of an adjustment: the signed sum of what final documents have billed of this item."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Invoice:
    """What one account owes for one period."""

    reference: str
    """`{account}-{period}`, such as `acme-2023-11`."""
    status: Literal["draft", "final"]
    kind: Literal["invoice", "void", "credit_note"] = "invoice"
    number: str | None = None
    """Of a final document, such as `INV-000042`."""
    names: str | None = None
    """The number of the document that a void or a credit note is about."""
    account: str
    name: str | None
    address: tuple[str, ...]
    plan: str
    plan_version: int
    """The version in force at the end of the period."""
    currency: str
    period: str
    """The month the period starts in, such as `2023-11`."""
    period_start: datetime
    period_end: datetime
    """The first instant that is no longer billed."""
    time_zone: str
    issued_on: date
    """The account's local date: of a final document when it was issued, of a draft when the period ends."""
    items: tuple[InvoiceItem, ...]
    total: Decimal
    usage: tuple[UsageSum, ...]
    requests: int
    input_tokens: int
    output_tokens: int
    provider_cost: Decimal
    """In USD, over `usage`."""
    unpriced_requests: int

    def to_json(self) -> bytes:
        """The document: keys sorted, Decimals as plain strings, times in UTC. Equal invoices give equal bytes."""
        document = _jsonable(asdict(self))
        return (json.dumps(document, sort_keys=True, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_json(cls, document: bytes) -> Invoice:
        """The invoice of which `document` is the `to_json`. Raises `InvalidSetting` for anything else."""
        try:
            given = _with_decimals(json.loads(document))
            given["items"] = tuple(InvoiceItem(**_with_decimals(item)) for item in given["items"])
            given["usage"] = tuple(UsageSum(**_with_decimals(row)) for row in given["usage"])
            given["address"] = tuple(given["address"])
            given["issued_on"] = date.fromisoformat(given["issued_on"])
            for key in ("period_start", "period_end"):
                given[key] = datetime.fromisoformat(given[key])
            return cls(**given)
        except (ArithmeticError, KeyError, TypeError, ValueError) as exc:
            raise InvalidSetting("document", document, "what Invoice.to_json wrote") from exc


def build_invoice(
    *,
    account: str,
    name: str | None,
    address: Sequence[str],
    plans: Mapping[int, Plan],
    plan_version: int,
    period: str,
    period_start: datetime,
    period_end: datetime,
    time_zone: str,
    usage: Iterable[UsageSum],
    active_from: datetime | None,
) -> Invoice:
    """What an account owes for one period: base fee, an item for each rate, and what is missing to the plan's minimum.

    `plans` are by plan version; `plan_version` is the one in force at the end of the period. Usage is priced by the
    version it is on, each version's quantity on its own; what is due once a period comes from the version in force.
    The base fee is for the local days from that of `active_from`; None is the whole period. Items of neither usage nor
    money are left out. Where a plan says `zero_and_flag`, a cost_plus item says how many requests are in it at 0.

    Raises `AmbiguousRate`; `UnpricedUsage` where a cost_plus rate of any other plan meets usage without a price;
    `InvalidPlan` where a version is missing from `plans` or an earlier one bills in another currency.
    """
    rows = sorted(usage, key=_usage_order)
    in_force = _plan_of(plans, plan_version)
    window = Window(start=period_start, end=period_end)
    _, issued_on = local_dates(window, time_zone)
    with localcontext(EXACT):
        fee = _base_fee(in_force, plan_version, window, time_zone, active_from)
        items = [fee] if fee.exact_amount else []
        for version in sorted({plan_version, *(row.plan_version for row in rows)}):
            on_version = [row for row in rows if row.plan_version == version]
            items += _rate_items(_plan_of(plans, version), version, on_version, in_force, fixed=version == plan_version)
        items += _minimum(in_force, plan_version, sum((item.amount for item in items), Decimal(0)))
        return Invoice(
            reference=f"{account}-{period}",
            status="draft",
            account=account,
            name=name,
            address=tuple(address),
            plan=in_force.name,
            plan_version=plan_version,
            currency=in_force.currency,
            period=period,
            period_start=period_start,
            period_end=period_end,
            time_zone=time_zone,
            issued_on=issued_on,
            items=tuple(items),
            total=round_money(sum((item.amount for item in items), Decimal(0)), in_force.currency),
            usage=tuple(rows),
            requests=sum(row.requests for row in rows),
            input_tokens=sum(row.input_tokens for row in rows),
            output_tokens=sum(row.output_tokens for row in rows),
            provider_cost=sum((row.cost for row in rows), Decimal(0)),
            unpriced_requests=sum(row.unpriced_requests for row in rows),
        )


def _plan_of(plans: Mapping[int, Plan], version: int) -> Plan:
    if version not in plans:
        raise InvalidPlan("plans", f"plan version {version} is needed for this invoice, got only {sorted(plans)}")
    return plans[version]


def _base_fee(plan: Plan, version: int, window: Window, time_zone: str, active_from: datetime | None) -> InvoiceItem:
    first, after = local_dates(window, time_zone)
    days = active_days = (after - first).days
    if active_from is not None and active_from > window.start:
        since, _ = local_dates(Window(start=active_from, end=window.end), time_zone)
        active_days = max(0, (after - since).days)
    part = f" ({active_days} of {days} days)" if active_days < days else ""
    exact = quotient(plan.base_fee * active_days, days)
    return _fixed_item("base_fee", f"Base fee ({plan.name}){part}", plan, version, exact)


def _minimum(plan: Plan, version: int, subtotal: Decimal) -> list[InvoiceItem]:
    missing = plan.minimum - subtotal
    if missing <= 0:
        return []
    least = f"{round_money(plan.minimum, plan.currency):f} {plan.currency}"
    return [_fixed_item("minimum", f"Up to the minimum of {least} ({plan.name})", plan, version, missing)]


def _fixed_item(item_id: str, description: str, plan: Plan, version: int, exact: Decimal) -> InvoiceItem:
    return InvoiceItem(
        item_id=item_id,
        description=description,
        line=None,
        metric=None,
        quantity=None,
        plan_version=version,
        rate=None,
        exact_amount=exact,
        amount=round_money(exact, plan.currency),
    )


def _rate_items(plan: Plan, version: int, usage: list[UsageSum], in_force: Plan, *, fixed: bool) -> list[InvoiceItem]:
    """The items of one plan version; `fixed` tells whether what is due once a period is part of them."""
    items = []
    for claim in claims(plan, usage):
        _check_priced(plan, claim)
        rate: Rate | None = claim.rate
        description = str(claim.rate)
        if not fixed:
            rate = claim.rate.metered_only()
            description += f" ({plan.name}, plan version {version})"
        if claim.unpriced_requests:
            description += f" (requests of unknown price, at 0: {claim.unpriced_requests:,})"
        if rate is None:
            continue
        item = _rate_item(rate, description, plan, version, claim)
        if item.exact_amount or item.quantity or claim.unpriced_requests:
            _check_currency(plan, version, claim, in_force)
            items.append(item)
    return items


def _rate_item(rate: Rate, description: str, plan: Plan, version: int, claim: Claim) -> InvoiceItem:
    exact = rate.amount(claim.quantity)
    return InvoiceItem(
        item_id=f"v{version}/rates/{claim.index}",
        description=description,
        line=rate.line,
        metric=rate.metric,
        quantity=None if rate.type == "flat" else claim.quantity,
        plan_version=version,
        rate=rate.to_dict(),
        exact_amount=exact,
        amount=round_money(exact, plan.currency),
    )


def _check_priced(plan: Plan, claim: Claim) -> None:
    if claim.unpriced_requests and plan.unknown_price != "zero_and_flag":
        either = f", not even as {plan.named_price!r}" if plan.named_price else ""
        raise UnpricedUsage(
            f"plan {plan.name!r}: rates[{claim.index}] ({claim.rate}) bills provider cost, "
            f"which is not known for {claim.unpriced_requests:,} of the requests it is for{either}",
            requests=claim.unpriced_requests,
        )


def _check_currency(plan: Plan, version: int, claim: Claim, in_force: Plan) -> None:
    if plan.currency != in_force.currency:
        raise InvalidPlan(
            f"plans.{plan.name}.rates[{claim.index}]",
            f"prices usage of this period in {plan.currency} (plan version {version}), but plan {in_force.name!r}, "
            f"in force at its end, is in {in_force.currency}; an invoice has one currency, so an account changes to a "
            "plan in another currency where a period starts",
        )


def _usage_order(row: UsageSum) -> tuple[tuple[bool, Any], ...]:
    """Any order that is always the same; None sorts before every text."""
    return tuple((value is not None, value if value is not None else 0) for value in astuple(row))


_MONEY_FIELDS = frozenset({"amount", "total", "already_billed"})
"""Already in the currency's decimals, which are kept."""
_DECIMAL_FIELDS = _MONEY_FIELDS | {"quantity", "exact_amount", "cost", "provider_cost"}


def _jsonable(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(inner, name) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(inner) for inner in value]
    if isinstance(value, Decimal):
        return f"{value:f}" if key in _MONEY_FIELDS else written(value)
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, date) else value


def _with_decimals(document: dict[str, Any]) -> dict[str, Any]:
    return {
        key: Decimal(value) if key in _DECIMAL_FIELDS and value is not None else value
        for key, value in dict(document).items()
    }
