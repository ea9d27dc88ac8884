"""Invoices and summaries built by hand, the same at every call."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pytest

from metering.billing.invoices import Invoice, InvoiceItem, UsageSum
from reports.summary import AccountRow, ModelRow, PeriodSummary, UsageDay

PER_MILLION = {"line": "application", "type": "per_unit", "unit_amount": "2.50", "per": 1_000_000}


def make_item(**changes: Any) -> InvoiceItem:
    fields = {
        "item_id": "v3/rates/0",
        "description": "Input tokens",
        "line": "application",
        "metric": "input_tokens",
        "quantity": Decimal(18_059_974),
        "plan_version": 3,
        "rate": PER_MILLION,
        "exact_amount": Decimal("45.149935"),
        "amount": Decimal("45.15"),
    }
    return InvoiceItem(**{**fields, **changes})


def make_usage(**changes: Any) -> UsageSum:
    fields = {
        "plan_version": 3,
        "line": "application",
        "provider": "openai",
        "model": "gpt-4.1",
        "service_tier": None,
        "requests": 8_819,
        "quantity": Decimal(0),
        "input_tokens": 18_059_974,
        "cache_read_tokens": 1_234_567,
        "output_tokens": 245_896,
        "reasoning_tokens": 7_654,
        "cost": Decimal("31.20"),
    }
    return UsageSum(**{**fields, **changes})


def make_invoice(**changes: Any) -> Invoice:
    usage = changes.pop("usage", (make_usage(),))
    fee = make_item(
        item_id="base_fee",
        description="Base fee",
        line=None,
        metric=None,
        quantity=None,
        rate=None,
        exact_amount=Decimal(49),
        amount=Decimal(49),
    )
    items = changes.pop("items", (fee, make_item()))
    fields = {
        "reference": "acme-2023-11",
        "status": "draft",
        "account": "acme",
        "name": "Acme Robotics",
        "address": ("12 Harbour Street", "Portland"),
        "plan": "pro",
        "plan_version": 3,
        "currency": "USD",
        "period": "2023-11",
        "period_start": datetime(2023, 11, 1, 7, tzinfo=UTC),
        "period_end": datetime(2023, 12, 1, 8, tzinfo=UTC),
        "time_zone": "America/Los_Angeles",
        "issued_on": date(2023, 12, 1),
        "items": items,
        "total": sum((item.amount for item in items), Decimal(0)),
        "usage": usage,
        "requests": sum(part.requests for part in usage),
        "input_tokens": sum(part.input_tokens for part in usage),
        "output_tokens": sum(part.output_tokens for part in usage),
        "provider_cost": Decimal("31.20"),
        "unpriced_requests": 0,
    }
    return Invoice(**{**fields, **changes})


def make_account(account: str, **changes: Any) -> AccountRow:
    total, cost = changes.pop("total", Decimal("94.15")), changes.pop("provider_cost", Decimal("31.20"))
    currency = changes.pop("currency", "USD")
    fields = {
        "account": account,
        "name": None,
        "plan": "pro",
        "currency": currency,
        "requests": 8_819,
        "input_tokens": 18_059_974,
        "output_tokens": 245_896,
        "total": total,
        "provider_cost": cost,
        "margin": total - cost if currency == "USD" else None,
        "unpriced_requests": 0,
        "invoice_href": f"invoices/{account}-2023-11",
    }
    return AccountRow(**{**fields, **changes})


def make_day(number: int, series: str = "gpt-4.1", tokens: int = 1_000_000) -> UsageDay:
    return UsageDay(date=date(2023, 11, number), series=series, requests=10, tokens=tokens, cost=Decimal("0.125"))


def make_model(
    model: str | None = "gpt-4.1", provider: str | None = "openai", tokens: int = 9_000, unpriced_requests: int = 0
) -> ModelRow:
    return ModelRow(
        provider=provider,
        model=model,
        requests=4,
        input_tokens=tokens,
        output_tokens=500,
        cost=Decimal("1.5"),
        unpriced_requests=unpriced_requests,
    )


def make_summary(**changes: Any) -> PeriodSummary:
    fields = {
        "period": "November 2023",
        "accounts": (make_account("acme"), make_account("beta", plan="free", total=Decimal(0))),
        "days": tuple(make_day(n, series) for n in (1, 2, 4) for series in ("gpt-4.1", "o4-mini")),
        "models": (make_model(), make_model("o4-mini", tokens=12_000)),
    }
    return PeriodSummary(**{**fields, **changes})


class Make:
    """The builders above; every field has a default."""

    item = staticmethod(make_item)
    usage = staticmethod(make_usage)
    invoice = staticmethod(make_invoice)
    account = staticmethod(make_account)
    day = staticmethod(make_day)
    model = staticmethod(make_model)
    summary = staticmethod(make_summary)


@pytest.fixture(scope="session")
def make() -> Make:
    return Make()
