"""The index page of closed periods: what each document is, and that an account is one however many it has."""

from __future__ import annotations

import re
from datetime import UTC, datetime

from metering.events import TokenUsage
from metering.meter import Meter
from tasks.closing import credit_invoice, void_invoice
from tests.tasks.place import PERIOD, Place, event

PLANS = """
[plans.dollars]
retention_days = 30
rates = [{ line = "*", metric = "input_tokens", type = "per_unit", unit_amount = "1", per = 1_000_000 }]

[plans.euros]
retention_days = 30
currency = "EUR"
base_fee = "10.00"
"""
DECEMBER = datetime(2023, 12, 16, tzinfo=UTC)
MILLIONS = TokenUsage(input_tokens=4_000_000)


def words_of(place: Place, period: str = PERIOD) -> str:
    index = (place.out / period / "index.html").read_text()
    return " ".join(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", index, flags=re.DOTALL).split())


def test_documents_are_named_and_accounts_counted_once(place: Place) -> None:
    place.plans(PLANS)
    wrong = event("beta", usage=MILLIONS)
    for name in ("acme", "beta", "gamma"):
        place.account(name, "dollars")
    place.add(event("acme", usage=MILLIONS), wrong)
    place.close()
    assert void_invoice(place.ledger_url, "INV-000001", DECEMBER, actor="finance", reason="-") == "INV-000003"
    with place.meter() as meter:
        meter.correct(wrong.event_id, usage=TokenUsage(input_tokens=3_000_000), reason="recounted")
    place.aggregate()
    credited = credit_invoice(place.ledger_url, place.warehouse, "INV-000002", DECEMBER, actor="finance", reason="-")
    assert credited == "INV-000004"
    assert place.bill() == []
    words = words_of(place)
    assert "Accounts billed 2 " in words
    assert "Total of 2 in USD" in words
    assert re.findall(r"((?:acme|beta)(?: [a-z ]+ of \S+)?) dollars [^U]*? (-?\S+) USD .*? (INV-\d+) HTML", words) == [
        ("beta", "4.00", "INV-000002"),
        ("beta credit note of INV-000002", "-1.00", "INV-000004"),
        ("acme", "4.00", "INV-000001"),
        ("acme void of INV-000001", "-4.00", "INV-000003"),
    ]


def test_a_document_in_another_currency_is_not_of_the_plan_of_its_period(place: Place) -> None:
    place.plans(PLANS)
    place.account("acme", "dollars")
    place.add(event(usage=MILLIONS))
    place.close()
    with Meter(place.ledger_url, clock=lambda: datetime(2023, 12, 1, tzinfo=UTC)) as meter:
        meter.accounts.change_plan("acme", plan="euros")
    place.add(event(usage=MILLIONS))
    place.aggregate()
    for number in ("draft", "INV-000002"):
        if number != "draft":
            assert place.close_loaded("2023-12").numbers == ("INV-000002", "INV-000003")
        assert place.bill("2023-12") == []
        page = (place.out / "2023-12" / "index.html").read_text()
        assert "Revenue by plan in USD, bars: (earlier periods) 4.00." in page
        assert "Revenue by plan in EUR, bars: euros 10.00." in page
        words = words_of(place, "2023-12")
        assert "Accounts billed 1 " in words
        assert "acme euros 0 0 0 10.00 EUR" in words
        assert f"{number} HTML" in words
        # What it cost is a matter of November's.
        assert "acme \N{EN DASH} 0 0 0 4.00 USD 0.00 \N{EN DASH}" in words
        assert "Margin \N{EN DASH} where billed in USD" in words
