"""An invoice as a page for people and as rows for a spreadsheet."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from metering.billing.money import minor_digits
from reports.formats import cell, exact_sum, plain
from reports.pages import page
from reports.rates import rate_words

if TYPE_CHECKING:
    from decimal import Decimal

    from metering.billing.invoices import Invoice, InvoiceItem, UsageSum

__all__ = ["invoice_csv", "invoice_html"]

CSV_COLUMNS = (
    "reference",
    "account",
    "period",
    "item_id",
    "description",
    "line",
    "metric",
    "quantity",
    "exact_amount",
    "amount",
    "currency",
    "number",
    "kind",
    "names",
    "already_billed",
)
TITLES = {"invoice": "Invoice", "void": "Void", "credit_note": "Credit note"}


def invoice_html(invoice: Invoice) -> str:
    """The invoice as one self-contained page, to read on a screen or print on A4."""
    return page(
        "invoice.html",
        title=TITLES[invoice.kind],
        invoice=invoice,
        items=[(item, rate_words(item.rate, invoice.currency) if item.rate else None) for item in invoice.items],
        usage=_usage_rows(invoice.usage),
        totals=_usage_totals(invoice),
    )


def invoice_csv(invoice: Invoice) -> str:
    """The items as RFC 4180 rows under `CSV_COLUMNS`: numbers plain and exact, no cell a spreadsheet would execute."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\r\n")
    rows.writerow(CSV_COLUMNS)
    rows.writerows(_csv_row(invoice, item) for item in invoice.items)
    return out.getvalue()


def _csv_row(invoice: Invoice, item: InvoiceItem) -> tuple[str, ...]:
    digits = minor_digits(invoice.currency)
    return (
        cell(invoice.reference),
        cell(invoice.account),
        cell(invoice.period),
        cell(item.item_id),
        cell(item.description),
        cell(item.line),
        cell(item.metric),
        "" if item.quantity is None else plain(item.quantity),
        plain(item.exact_amount),
        plain(item.amount, digits),
        cell(invoice.currency),
        cell(invoice.number),
        cell(invoice.kind),
        cell(invoice.names),
        "" if item.already_billed is None else plain(item.already_billed, digits),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _UsageRow:
    """Usage of one line and model, over plan versions and service tiers."""

    line: str
    provider: str | None
    model: str | None
    requests: int
    input_tokens: int
    cache_read_tokens: int
    output_tokens: int
    reasoning_tokens: int
    quantity: Decimal


def _usage_rows(usage: tuple[UsageSum, ...]) -> list[_UsageRow]:
    groups: dict[tuple[str, str, str], list[UsageSum]] = {}
    for part in usage:
        groups.setdefault((part.line, part.model or "", part.provider or ""), []).append(part)
    return [
        _UsageRow(
            line=parts[0].line,
            provider=parts[0].provider,
            model=parts[0].model,
            requests=sum(part.requests for part in parts),
            input_tokens=sum(part.input_tokens for part in parts),
            cache_read_tokens=sum(part.cache_read_tokens for part in parts),
            output_tokens=sum(part.output_tokens for part in parts),
            reasoning_tokens=sum(part.reasoning_tokens for part in parts),
            quantity=exact_sum(part.quantity for part in parts),
        )
        for _, parts in sorted(groups.items())
    ]


def _usage_totals(invoice: Invoice) -> dict[str, int | Decimal | None]:
    """`quantity` is None where lines count different things and a sum would mean nothing."""
    counting = {part.line for part in invoice.usage if part.quantity}
    return {
        "requests": invoice.requests,
        "input_tokens": invoice.input_tokens,
        "cache_read_tokens": sum(part.cache_read_tokens for part in invoice.usage),
        "output_tokens": invoice.output_tokens,
        "reasoning_tokens": sum(part.reasoning_tokens for part in invoice.usage),
        "quantity": exact_sum(part.quantity for part in invoice.usage) if len(counting) <= 1 else None,
    }
