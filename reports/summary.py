"""What a billing period came to over all accounts, and the page that says so."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from urllib.parse import quote

from reports import charts
from reports.formats import exact_sum, percent
from reports.pages import page

if TYPE_CHECKING:
    from datetime import date
    from decimal import Decimal

__all__ = ["AccountRow", "ModelRow", "PeriodSummary", "UsageDay", "summary_html"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AccountRow:
    """One document of a billed account; or all that it has in one currency, added up."""

    account: str
    name: str | None
    number: str | None = None
    """Of a final document."""
    about: str | None = None
    """What a void or a credit note is, such as `void of INV-000001`."""
    plan: str | None
    """In force at the end of the period; None where the document is in another currency than that, for what came late
    for periods on another plan."""
    currency: str
    requests: int
    input_tokens: int
    output_tokens: int
    total: Decimal
    """Of its invoice, in `currency`."""
    provider_cost: Decimal
    """In USD, as far as prices are known."""
    margin: Decimal | None
    """`total` less `provider_cost`, in USD; None where it is billed in another currency, a price is not known or
    there is no `plan`: what came late cost something in its own period."""
    unpriced_requests: int
    """Requests whose provider cost is not known, so not in `provider_cost`."""
    invoice_href: str
    """Path of the invoice's files from the page, such as `invoices/acme-2023-11`: unencoded, without `.html`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageDay:
    """Usage of one series, a line or a model, on one day."""

    date: date
    series: str
    requests: int
    tokens: int
    """Input and output."""
    cost: Decimal
    """In USD."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRow:
    """Usage of one model over the period."""

    provider: str | None
    model: str | None
    requests: int
    input_tokens: int
    output_tokens: int
    cost: Decimal
    """In USD, as far as prices are known."""
    unpriced_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeriodSummary:
    """Everything the summary page of a period shows. Totals follow from the rows."""

    period: str
    """Its name for people, such as `November 2023`."""
    accounts: tuple[AccountRow, ...]
    """By document."""
    days: tuple[UsageDay, ...] = ()
    models: tuple[ModelRow, ...] = ()
    problems: tuple[tuple[str, str], ...] = ()
    """Accounts that could not be billed, each with the reason."""


def summary_html(summary: PeriodSummary) -> str:
    """The index page of a period, self-contained: totals, four plots, and every account with its documents."""
    documents: defaultdict[tuple[str, str], list[AccountRow]] = defaultdict(list)
    for document in sorted(summary.accounts, key=lambda row: row.number or ""):
        documents[document.account, document.currency].append(document)
    rows = _by_total([_added_up(each) for each in documents.values()])
    totals = [
        _totals([row for row in rows if row.currency == currency], currency)
        for currency in dict.fromkeys(row.currency for row in rows)
    ]
    return page(
        "summary.html",
        summary=summary,
        totals=totals,
        # Provider cost is in USD, so a margin is known in USD alone.
        in_usd=next((total for total in totals if total.margin is not None), None),
        provider_cost=exact_sum(total.provider_cost for total in totals),
        figures=(
            charts.usage_by_day(summary.days),
            charts.usage_by_model(summary.models),
            charts.revenue_by_plan(rows),
            charts.margin_by_account(rows),
        ),
        accounts=len({row.account for row in rows}),
        documents=[
            (document, quote(document.invoice_href))
            for row in rows
            for document in documents[row.account, row.currency]
        ],
        models=sorted(summary.models, key=lambda row: -(row.input_tokens + row.output_tokens)),
        days=_day_totals(summary.days),
    )


def _added_up(rows: list[AccountRow]) -> AccountRow:
    """The documents that an account has in one currency as one row. Its margin is known where that of each is."""
    margins = [row.margin for row in rows if row.margin is not None]
    return replace(
        rows[0],
        number=None,
        about=None,
        requests=sum(row.requests for row in rows),
        input_tokens=sum(row.input_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        total=exact_sum(row.total for row in rows),
        provider_cost=exact_sum(row.provider_cost for row in rows),
        margin=exact_sum(margins) if len(margins) == len(rows) else None,
        unpriced_requests=sum(row.unpriced_requests for row in rows),
    )


def _by_total(rows: list[AccountRow]) -> list[AccountRow]:
    """Largest total first; the currencies one after the other, the one of most accounts first."""
    uses = Counter(row.currency for row in rows)
    return sorted(rows, key=lambda row: (-uses[row.currency], row.currency, -row.total, row.account))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Totals:
    """Sums over some accounts. `revenue` is only a sum of money where they share a currency."""

    currency: str
    accounts: int
    requests: int
    input_tokens: int
    output_tokens: int
    revenue: Decimal
    provider_cost: Decimal
    margin: Decimal | None
    margin_share: str | None
    unpriced_requests: int


def _totals(rows: list[AccountRow], currency: str) -> _Totals:
    revenue = exact_sum(row.total for row in rows)
    margins = [row.margin for row in rows if row.margin is not None]
    margin = exact_sum(margins) if margins else None
    return _Totals(
        currency=currency,
        accounts=len(rows),
        requests=sum(row.requests for row in rows),
        input_tokens=sum(row.input_tokens for row in rows),
        output_tokens=sum(row.output_tokens for row in rows),
        revenue=revenue,
        provider_cost=exact_sum(row.provider_cost for row in rows),
        margin=margin,
        margin_share=None if margin is None else percent(margin, revenue),
        unpriced_requests=sum(row.unpriced_requests for row in rows),
    )


def _day_totals(days: tuple[UsageDay, ...]) -> list[tuple[date, int, int, Decimal]]:
    return [
        (
            date,
            sum(part.requests for part in days if part.date == date),
            sum(part.tokens for part in days if part.date == date),
            exact_sum(part.cost for part in days if part.date == date),
        )
        for date in sorted({part.date for part in days})
    ]
