from __future__ import annotations

from typing import Any

import pytest

from metering.billing.pricing import Rate
from metering.errors import InvalidPlan
from reports.rates import rate_words

TIERS = [{"up_to": 1000, "unit_amount": "0"}, {"up_to": 5000, "unit_amount": "0.01"}, {"unit_amount": "0.004"}]


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        ({"type": "flat", "amount": "12"}, "12.00 USD flat"),
        ({"type": "per_unit", "unit_amount": "2.50", "per": 1_000_000}, "2.50 USD per 1,000,000"),
        ({"type": "per_unit", "unit_amount": "0.004"}, "0.004 USD each"),
        (
            {"type": "graduated", "tiers": TIERS},
            "first 1,000 free, next 4,000 at 0.01 USD each, above 5,000 at 0.004 USD each",
        ),
        (
            {
                "type": "graduated",
                "tiers": [{"up_to": 10, "flat_amount": "5"}, {"unit_amount": "1", "flat_amount": "2"}],
            },
            "first 10 for 5.00 USD, above 10 at 1.00 USD each plus 2.00 USD",
        ),
        ({"type": "graduated", "tiers": [{"unit_amount": "3"}]}, "at 3.00 USD each"),
        (
            {"type": "volume", "tiers": TIERS},
            "all units free up to 1,000, at 0.01 USD each up to 5,000, at 0.004 USD each above 5,000",
        ),
        ({"type": "package", "package_size": 1000, "package_amount": "5"}, "5.00 USD per package of 1,000"),
        (
            {"type": "package", "package_size": 1000, "package_amount": "5", "free_units": 100},
            "5.00 USD per package of 1,000, first 100 free",
        ),
        ({"type": "cost_plus", "markup_percent": "12.5"}, "provider cost plus 12.5%"),
        (
            {"type": "per_unit", "unit_amount": "1", "included": 500, "minimum": "2", "maximum": "90"},
            "1.00 USD each, 500 included, at least 2.00 USD, at most 90.00 USD",
        ),
        ({"type": "per_unit", "unit_amount": "1", "maximum": "0"}, "1.00 USD each, at most 0.00 USD"),
    ],
)
def test_every_type_in_words(rate: dict[str, Any], words: str) -> None:
    assert rate_words(rate, "USD") == words
    counted = {} if rate["type"] in ("flat", "cost_plus") else {"metric": "quantity"}
    as_invoiced = Rate.from_dict({"line": "application", **counted, **rate}).to_dict()
    assert rate_words(as_invoiced, "USD") == words


def test_an_unknown_type_is_named() -> None:
    with pytest.raises(InvalidPlan, match=r"rate\.type: got 'lottery', expected one of flat, per_unit"):
        rate_words({"type": "lottery"}, "USD")
