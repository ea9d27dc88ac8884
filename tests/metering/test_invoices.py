from __future__ import annotations

import json
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.billing.invoices import Invoice, InvoiceItem, UsageSum, build_invoice
from metering.errors import AmbiguousRate, InvalidPlan, InvalidSetting, UnpricedUsage
from metering.plans import Plan

TOKEN_RATES = [
    {"line": "application", "metric": "input_tokens", "type": "per_unit", "unit_amount": "2.50", "per": 1_000_000},
    {"line": "application", "metric": "output_tokens", "type": "per_unit", "unit_amount": "10.00", "per": 1_000_000},
]


def plan(name: str = "pro", **document: Any) -> Plan:
    return Plan.from_dict(name, {"retention_days": 30, **document})


def usage(**more: Any) -> UsageSum:
    values: dict[str, Any] = {
        "plan_version": 7,
        "line": "application",
        "provider": "openai",
        "model": "gpt-4.1",
        "service_tier": None,
        "requests": 1,
        "quantity": Decimal(0),
        "cost": Decimal(0),
    }
    return UsageSum(**values | more)


def october(plans: dict[int, Plan], *rows: UsageSum, plan_version: int = 7, **more: Any) -> Invoice:
    values: dict[str, Any] = {
        "account": "acme",
        "name": "Acme",
        "address": ["1 Road", "Town"],
        "plans": plans,
        "plan_version": plan_version,
        "period": "2026-10",
        "period_start": datetime(2026, 10, 1, tzinfo=UTC),
        "period_end": datetime(2026, 11, 1, tzinfo=UTC),
        "time_zone": "UTC",
        "usage": rows,
        "active_from": None,
    }
    return build_invoice(**values | more)


def amounts(invoice: Invoice) -> list[tuple[str, str]]:
    return [(item.item_id, str(item.amount)) for item in invoice.items]


WORKED = usage(requests=9000, input_tokens=18_059_974, output_tokens=245_896, cost=Decimal("38.1"))


def test_the_worked_example() -> None:
    invoice = october({7: plan(rates=TOKEN_RATES)}, WORKED)
    assert amounts(invoice) == [("v7/rates/0", "45.15"), ("v7/rates/1", "2.46")]
    assert str(invoice.total) == "47.61"
    first = invoice.items[0]
    assert (first.description, first.line, first.metric) == ("application: input tokens", "application", "input_tokens")
    assert (first.quantity, first.exact_amount) == (Decimal(18_059_974), Decimal("45.149935"))
    assert first.rate is not None
    assert first.rate["unit_amount"] == "2.5"
    assert (invoice.reference, invoice.period, invoice.issued_on) == ("acme-2026-10", "2026-10", date(2026, 11, 1))
    assert (invoice.requests, invoice.input_tokens, invoice.output_tokens) == (9000, 18_059_974, 245_896)
    assert (invoice.provider_cost, invoice.unpriced_requests) == (Decimal("38.1"), 0)
    assert (invoice.plan, invoice.plan_version, invoice.currency) == ("pro", 7, "USD")


def test_nothing_used_and_nothing_due_is_an_invoice_of_nothing() -> None:
    invoice = october({7: plan(rates=TOKEN_RATES)})
    assert (invoice.items, str(invoice.total)) == ((), "0.00")


def test_usage_that_is_free_is_still_shown() -> None:
    free = {"metric": "requests", "type": "per_unit", "unit_amount": "1", "included": 10}
    assert amounts(october({7: plan(rates=[free])}, usage(requests=4))) == [("v7/rates/0", "0.00")]


def test_what_is_due_without_usage_is_billed() -> None:
    rates = [
        {"line": "application", "type": "flat", "amount": "25.00"},
        {"metric": "requests", "type": "per_unit", "unit_amount": "1", "minimum": "3"},
        {"metric": "tokens", "type": "graduated", "tiers": [{"flat_amount": "4"}]},
    ]
    invoice = october({7: plan(rates=rates)})
    assert amounts(invoice) == [("v7/rates/0", "25.00"), ("v7/rates/1", "3.00"), ("v7/rates/2", "4.00")]
    assert [item.quantity for item in invoice.items] == [None, 0, 0]
    assert invoice.items[0].description == "application: flat fee"


@pytest.mark.parametrize(
    ("active_from", "description", "amount"),
    [
        (None, "Base fee (pro)", "49.00"),
        (datetime(2026, 9, 15, tzinfo=UTC), "Base fee (pro)", "49.00"),
        (datetime(2026, 10, 1, tzinfo=UTC), "Base fee (pro)", "49.00"),
        (datetime(2026, 10, 1, 23, 59, tzinfo=UTC), "Base fee (pro)", "49.00"),
        (datetime(2026, 10, 2, tzinfo=UTC), "Base fee (pro) (30 of 31 days)", "47.42"),
        (datetime(2026, 10, 31, 23, 59, tzinfo=UTC), "Base fee (pro) (1 of 31 days)", "1.58"),
    ],
)
def test_the_base_fee_is_for_the_days_the_account_was_there(
    active_from: datetime | None, description: str, amount: str
) -> None:
    (item,) = october({7: plan(base_fee="49.00")}, active_from=active_from).items
    assert (item.item_id, item.description, str(item.amount)) == ("base_fee", description, amount)


def test_an_account_that_came_after_the_period_owes_no_base_fee() -> None:
    assert october({7: plan(base_fee="49.00")}, active_from=datetime(2026, 11, 3, tzinfo=UTC)).items == ()


def test_days_are_those_of_the_accounts_own_calendar() -> None:
    # October in Berlin is 31 days and 25 hours on one of them; 22:30 UTC on the 4th is the 5th there.
    invoice = october(
        {7: plan(base_fee="31.00")},
        period_start=datetime(2026, 9, 30, 22, tzinfo=UTC),
        period_end=datetime(2026, 10, 31, 23, tzinfo=UTC),
        time_zone="Europe/Berlin",
        active_from=datetime(2026, 10, 4, 22, 30, tzinfo=UTC),
    )
    assert (invoice.items[0].description, str(invoice.total)) == ("Base fee (pro) (27 of 31 days)", "27.00")
    assert invoice.issued_on == date(2026, 11, 1)


def test_the_plans_minimum_tops_up_what_the_rounded_items_come_to() -> None:
    invoice = october({7: plan(minimum="100.00", base_fee="49.00", rates=TOKEN_RATES)}, WORKED)
    assert amounts(invoice)[-1] == ("minimum", "3.39")
    assert str(invoice.total) == "100.00"
    assert invoice.items[-1].description == "Up to the minimum of 100.00 USD (pro)"
    assert october({7: plan(minimum="47.61", rates=TOKEN_RATES)}, WORKED).items[-1].item_id == "v7/rates/1"


OLD_RATES = [
    {"type": "flat", "amount": "500"},
    {"metric": "requests", "type": "per_unit", "unit_amount": "1", "included": 100, "minimum": "90"},
    {"metric": "output_tokens", "type": "graduated", "tiers": [{"unit_amount": "0.01", "flat_amount": "70"}]},
]


def test_an_earlier_version_prices_its_usage_and_nothing_that_is_due_once() -> None:
    plans = {3: plan("starter", base_fee="200", minimum="900", rates=OLD_RATES), 7: plan(rates=TOKEN_RATES)}
    invoice = october(plans, WORKED, usage(plan_version=3, requests=5, output_tokens=300))
    assert amounts(invoice) == [
        ("v3/rates/1", "5.00"),
        ("v3/rates/2", "3.00"),
        ("v7/rates/0", "45.15"),
        ("v7/rates/1", "2.46"),
    ]
    assert invoice.items[0].description == "All lines: requests (starter, plan version 3)"
    assert invoice.items[0].rate == {
        "line": "*",
        "metric": "requests",
        "type": "per_unit",
        "unit_amount": "1",
        "per": 1,
    }
    assert str(invoice.total) == "55.61"


def test_each_versions_quantity_stands_alone() -> None:
    tiers = [{"up_to": 10, "unit_amount": "1"}, {"unit_amount": "0.1"}]
    rates = [{"metric": "requests", "type": "graduated", "tiers": tiers}]
    invoice = october(
        {3: plan(rates=rates), 7: plan(rates=rates)}, usage(requests=8), usage(plan_version=3, requests=8)
    )
    assert str(invoice.total) == "16.00"


def test_versions_in_two_currencies_do_not_meet_on_one_invoice() -> None:
    plans = {3: plan("old", rates=TOKEN_RATES), 7: plan("new", currency="EUR", rates=TOKEN_RATES)}
    with pytest.raises(InvalidPlan, match=r"in USD \(plan version 3\), but plan 'new'.* is in EUR"):
        october(plans, usage(plan_version=3, input_tokens=1))
    assert october(plans, usage(input_tokens=1_000_000)).currency == "EUR"


def test_a_free_plan_before_a_plan_in_euros_is_no_clash() -> None:
    invoice = october({3: plan("free"), 7: plan(currency="EUR", base_fee="10")}, usage(plan_version=3, requests=5))
    assert (invoice.currency, str(invoice.total), invoice.requests) == ("EUR", "10.00", 5)


def test_a_plan_version_that_was_not_given_is_named() -> None:
    with pytest.raises(InvalidPlan, match="plan version 8"):
        october({7: plan()}, usage(plan_version=8))
    with pytest.raises(InvalidPlan, match="plan version 9"):
        october({7: plan()}, plan_version=9)


def test_yen_have_no_decimals() -> None:
    rates = [{"metric": "requests", "type": "per_unit", "unit_amount": "0.5"}]
    assert amounts(october({7: plan(currency="JPY", rates=rates)}, usage(requests=5))) == [("v7/rates/0", "3")]


def test_cost_plus_waits_for_prices() -> None:
    plans = {7: plan(rates=[{"line": "application", "type": "cost_plus", "markup_percent": 20}])}
    with pytest.raises(UnpricedUsage, match=r"rates\[0\].*provider cost") as caught:
        october(plans, usage(cost=Decimal("1.00"), unpriced_requests=2), usage(model="x", unpriced_requests=1))
    assert caught.value.requests == 3
    invoice = october(plans, usage(cost=Decimal("1.23")), usage(line="other", unpriced_requests=4))
    assert amounts(invoice) == [("v7/rates/0", "1.48")]
    assert invoice.items[0].metric == "cost"
    assert invoice.unpriced_requests == 4


COST_PLUS = {"line": "application", "type": "cost_plus", "markup_percent": 20}


def test_usage_without_a_price_is_billed_at_zero_and_counted_where_the_plan_says_so() -> None:
    flagged = {7: plan(rates=[COST_PLUS], unknown_price="zero_and_flag")}
    invoice = october(flagged, usage(cost=Decimal("1.00")), usage(model="x", requests=2_000, unpriced_requests=2_000))
    assert amounts(invoice) == [("v7/rates/0", "1.20")]
    assert invoice.items[0].description.endswith("plus 20% (requests of unknown price, at 0: 2,000)")
    assert invoice.unpriced_requests == 2_000
    assert "unknown" not in october(flagged, usage(cost=Decimal("1.00"))).items[0].description


def test_an_item_of_nothing_but_usage_without_a_price_is_shown() -> None:
    flagged = plan("old", rates=[COST_PLUS], unknown_price="zero_and_flag")
    for version, name in ((7, ""), (3, " (old, plan version 3)")):
        invoice = october({3: flagged, 7: flagged}, usage(plan_version=version, unpriced_requests=1))
        assert amounts(invoice) == [(f"v{version}/rates/0", "0.00")]
        assert invoice.items[0].description.endswith(f"20%{name} (requests of unknown price, at 0: 1)")


def test_the_plan_version_of_the_usage_says_what_becomes_of_it_without_a_price() -> None:
    strict, lenient = plan(rates=[COST_PLUS]), plan(rates=[COST_PLUS], unknown_price="zero_and_flag")
    row = usage(plan_version=3, unpriced_requests=1)
    assert october({3: lenient, 7: strict}, row).unpriced_requests == 1
    with pytest.raises(UnpricedUsage):
        october({3: strict, 7: lenient}, row)


def test_a_named_price_that_does_not_fit_refuses_too() -> None:
    plans = {7: plan(rates=[COST_PLUS], unknown_price="openai:gpt-4.1-mini")}
    with pytest.raises(UnpricedUsage, match=r"not known for 1 of the .* not even as 'openai:gpt-4\.1-mini'"):
        october(plans, usage(unpriced_requests=1))


def test_ambiguity_stops_the_invoice() -> None:
    rates = [TOKEN_RATES[0], {**TOKEN_RATES[0], "line": "*", "match": {"model": "gpt-4.1"}}]
    with pytest.raises(AmbiguousRate):
        october({7: plan(rates=rates)}, WORKED)


def test_the_document_in_full() -> None:
    row = usage(requests=2, input_tokens=1_000_000, cost=Decimal("1.500000000000"), quantity=Decimal("1E+1"))
    invoice = october({7: plan(rates=TOKEN_RATES[:1])}, row, name=None)
    assert invoice.to_json().decode() == EXPECTED


EXPECTED = """\
{
  "account": "acme",
  "address": [
    "1 Road",
    "Town"
  ],
  "currency": "USD",
  "input_tokens": 1000000,
  "issued_on": "2026-11-01",
  "items": [
    {
      "already_billed": null,
      "amount": "2.50",
      "description": "application: input tokens",
      "exact_amount": "2.5",
      "item_id": "v7/rates/0",
      "line": "application",
      "metric": "input_tokens",
      "period": null,
      "plan_version": 7,
      "quantity": "1000000",
      "rate": {
        "line": "application",
        "metric": "input_tokens",
        "per": 1000000,
        "type": "per_unit",
        "unit_amount": "2.5"
      }
    }
  ],
  "kind": "invoice",
  "name": null,
  "names": null,
  "number": null,
  "output_tokens": 0,
  "period": "2026-10",
  "period_end": "2026-11-01T00:00:00Z",
  "period_start": "2026-10-01T00:00:00Z",
  "plan": "pro",
  "plan_version": 7,
  "provider_cost": "1.5",
  "reference": "acme-2026-10",
  "requests": 2,
  "status": "draft",
  "time_zone": "UTC",
  "total": "2.50",
  "unpriced_requests": 0,
  "usage": [
    {
      "cache_read_tokens": 0,
      "cache_write_1h_tokens": 0,
      "cache_write_tokens": 0,
      "cost": "1.5",
      "input_audio_tokens": 0,
      "input_tokens": 1000000,
      "line": "application",
      "model": "gpt-4.1",
      "output_audio_tokens": 0,
      "output_tokens": 0,
      "plan_version": 7,
      "provider": "openai",
      "quantity": "10",
      "reasoning_tokens": 0,
      "requests": 2,
      "service_tier": null,
      "unpriced_requests": 0
    }
  ]
}
"""


@pytest.mark.parametrize("document", [b"", b"[]", b"{}", b'{"items": 3}', b"\xff"])
def test_another_document_is_refused(document: bytes) -> None:
    with pytest.raises(InvalidSetting, match=r"Invoice\.to_json"):
        Invoice.from_json(document)


def test_a_field_too_many_is_refused() -> None:
    document = json.loads(october({7: plan()}, WORKED).to_json())
    assert Invoice.from_json(json.dumps(document).encode()).requests == 9000
    with pytest.raises(InvalidSetting):
        Invoice.from_json(json.dumps(document | {"tax": "1"}).encode())


exact = st.decimals(min_value=0, max_value=10**9, places=12)
ROWS = st.lists(
    st.builds(
        usage,
        plan_version=st.sampled_from([3, 7]),
        line=st.sampled_from(["application", "learnings"]),
        provider=st.sampled_from([None, "openai"]),
        model=st.sampled_from([None, "gpt-4.1", "gpt-4.1-mini", "é"]),
        requests=st.integers(0, 10**6),
        quantity=exact,
        input_tokens=st.integers(0, 10**12),
        output_tokens=st.integers(0, 10**12),
        cost=exact,
    ),
    max_size=8,
)
PLANS = {
    3: plan("starter", rates=OLD_RATES),
    7: plan(
        base_fee="49.00",
        minimum="100.00",
        rates=[
            *TOKEN_RATES,
            {**TOKEN_RATES[0], "per": 3, "match": {"model": "gpt-4.1*"}},
            {"metric": "quantity", "type": "package", "package_size": "7", "package_amount": "0.333"},
            {"type": "cost_plus", "markup_percent": "12.5"},
        ],
    ),
}
ACTIVE = st.none() | st.integers(0, 40).map(lambda days: datetime(2026, 9, 28, 5, tzinfo=UTC) + timedelta(days=days))


@given(ROWS.flatmap(lambda rows: st.tuples(st.just(rows), st.permutations(rows))), ACTIVE)
def test_equal_inputs_give_equal_bytes_and_come_back(
    both: tuple[list[UsageSum], list[UsageSum]], active_from: datetime | None
) -> None:
    invoice = october(PLANS, *both[0], active_from=active_from)
    document = invoice.to_json()
    padded = [rescaled(row) for row in both[1]]
    assert october(PLANS, *padded, active_from=active_from).to_json() == document
    again = Invoice.from_json(document)
    assert again == invoice
    assert again.to_json() == document


def rescaled(row: UsageSum) -> UsageSum:
    """The same numbers as a DECIMAL(38,12) column gives them, or with the zeros gone."""
    values = {name: getattr(row, name) for name in UsageSum.__dataclass_fields__}
    return UsageSum(**values | {"quantity": row.quantity.normalize(), "cost": row.cost.quantize(Decimal("1e-12"))})


@given(ROWS, ACTIVE)
def test_an_invoice_adds_up(rows: list[UsageSum], active_from: datetime | None) -> None:
    invoice = october(PLANS, *rows, active_from=active_from)
    assert invoice.total == sum(item.amount for item in invoice.items)
    assert invoice.total >= 100
    assert all(abs(item.amount - item.exact_amount) <= Decimal("0.005") for item in invoice.items)
    assert len({item.item_id for item in invoice.items}) == len(invoice.items)
    assert claimed(invoice.items, "output_tokens", 3) == sum(row.output_tokens for row in rows if row.plan_version == 3)
    assert claimed(invoice.items, "quantity", 7) == sum(row.quantity for row in rows if row.plan_version == 7)


def claimed(items: tuple[InvoiceItem, ...], metric: str, version: int) -> Decimal:
    mine = [item for item in items if item.metric == metric and item.plan_version == version]
    return sum((item.quantity for item in mine if item.quantity is not None), Decimal(0))
