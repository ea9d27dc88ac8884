"""Prices are held to a second implementation that counts quarter units one by one, in fractions."""

from __future__ import annotations

from decimal import Decimal, localcontext
from fractions import Fraction
from math import floor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.billing.money import CURRENCIES, minor_digits, quotient, round_money
from metering.billing.pricing import Match, Rate
from metering.errors import InvalidEvent, InvalidPlan

QUARTER = Fraction(1, 4)

money = st.decimals(min_value=0, max_value=1000, places=4, allow_nan=False, allow_infinity=False).map(
    lambda d: f"{d:f}"
)
quarters = st.integers(0, 240).map(lambda n: Decimal(n) / 4)


def as_text(number: Decimal) -> str:
    return f"{number:f}"


@st.composite
def tiers(draw: st.DrawFn) -> list[dict[str, str]]:
    ends = sorted(draw(st.sets(st.integers(1, 160), max_size=4)))
    steps = [{"up_to": as_text(Decimal(end) / 4)} for end in ends] + [{}]
    return [step | {"unit_amount": draw(money), "flat_amount": draw(st.just("0") | money)} for step in steps]


def numbers_of(kind: str) -> st.SearchStrategy[dict[str, Any]]:
    match kind:
        case "flat":
            return st.fixed_dictionaries({"amount": money})
        case "per_unit":
            return st.fixed_dictionaries(
                {"unit_amount": money, "per": st.sampled_from([1, 3, 7, 40, 1000, 999_983, 1_000_000])}
            )
        case "package":
            return st.fixed_dictionaries(
                {
                    "package_size": st.integers(1, 60).map(lambda n: as_text(Decimal(n) / 4)),
                    "package_amount": money,
                    "free_units": quarters.map(as_text),
                }
            )
        case "cost_plus":
            return st.fixed_dictionaries({"markup_percent": money})
        case _:
            return st.fixed_dictionaries({"tiers": tiers()})


@st.composite
def rates(draw: st.DrawFn, *kinds: str) -> dict[str, Any]:
    kind = draw(st.sampled_from(kinds or ("flat", "per_unit", "graduated", "volume", "package", "cost_plus")))
    document = {"type": kind, **draw(numbers_of(kind))}
    if kind not in ("flat", "cost_plus"):
        document["metric"] = "quantity"
    if draw(st.booleans()):
        document["included"] = as_text(draw(quarters))
    least, most = sorted((draw(money), draw(money)), key=Fraction)
    if draw(st.booleans()):
        document["minimum"] = least
    if draw(st.booleans()):
        document["maximum"] = most
    return document


def tier_of(steps: list[dict[str, str]], unit_end: Fraction) -> int:
    for index, step in enumerate(steps):
        if "up_to" not in step or unit_end <= Fraction(step["up_to"]):
            return index
    raise AssertionError("the last tier has no end")


def obvious_price(document: dict[str, Any], units: Fraction) -> Fraction:
    match document["type"]:
        case "flat":
            return Fraction(document["amount"])
        case "per_unit":
            return units * Fraction(document["unit_amount"]) / Fraction(document["per"])
        case "cost_plus":
            return units + units * Fraction(document["markup_percent"]) / 100
        case "package":
            left, packages = units - Fraction(document["free_units"]), 0
            while left > 0:
                left -= Fraction(document["package_size"])
                packages += 1
            return packages * Fraction(document["package_amount"])
    steps = document["tiers"]
    if document["type"] == "volume":
        step = steps[tier_of(steps, units)]
        return units * Fraction(step["unit_amount"]) + Fraction(step["flat_amount"])
    entered, total, counted = {0}, Fraction(0), Fraction(0)
    while counted < units:
        counted += QUARTER
        index = tier_of(steps, counted)
        entered.add(index)
        total += QUARTER * Fraction(steps[index]["unit_amount"])
    return total + sum(Fraction(steps[index]["flat_amount"]) for index in entered)


def obvious_amount(document: dict[str, Any], quantity: Decimal) -> Fraction:
    units = max(Fraction(0), Fraction(quantity) - Fraction(document.get("included", "0")))
    amount = obvious_price(document, units)
    if "minimum" in document:
        amount = max(amount, Fraction(document["minimum"]))
    if "maximum" in document:
        amount = min(amount, Fraction(document["maximum"]))
    return amount


def obvious_rounding(exact: Fraction, digits: int) -> Fraction:
    size = floor(abs(exact) * 10**digits + Fraction(1, 2))
    return Fraction(size if exact >= 0 else -size, 10**digits)


def ends(fraction: Fraction) -> bool:
    rest = fraction.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


@given(rates(), quarters)
def test_amount_is_what_its_definition_says(document: dict[str, Any], quantity: Decimal) -> None:
    amount = Fraction(Rate.from_dict(document).amount(quantity))
    expected = obvious_amount(document, quantity)
    if ends(expected):
        assert amount == expected
    else:
        assert abs(amount - expected) <= Fraction(1, 2 * 10**40)


@given(rates(), quarters, st.sampled_from(["USD", "JPY", "KWD"]))
def test_the_rounded_amount_is_the_rounded_fraction(document: dict[str, Any], quantity: Decimal, currency: str) -> None:
    rounded = round_money(Rate.from_dict(document).amount(quantity), currency)
    assert Fraction(rounded) == obvious_rounding(obvious_amount(document, quantity), minor_digits(currency))


@given(rates())
def test_a_rate_survives_being_written(document: dict[str, Any]) -> None:
    rate = Rate.from_dict(document)
    assert Rate.from_dict(rate.to_dict()) == rate
    assert Rate.from_dict(rate.to_dict()).to_dict() == rate.to_dict()


@given(rates("graduated", "per_unit", "package", "cost_plus", "flat"), quarters, quarters)
def test_more_units_never_cost_less(document: dict[str, Any], one: Decimal, another: Decimal) -> None:
    rate = Rate.from_dict(document)
    assert rate.amount(min(one, another)) <= rate.amount(max(one, another))


def test_volume_is_the_one_type_where_more_units_may_cost_less() -> None:
    rate = volume({"up_to": 100, "unit_amount": "1"}, {"unit_amount": "0.5"})
    assert rate.amount(100) == 100
    assert rate.amount(101) == Decimal("50.5")


@given(rates("graduated"), quarters)
def test_graduated_tiers_sum_up(document: dict[str, Any], quantity: Decimal) -> None:
    plain = {"type": "graduated", "metric": "quantity", "tiers": document["tiers"]}
    below, total = Decimal(0), Decimal(0)
    for index, step in enumerate(plain["tiers"]):
        inside = max(Decimal(0), min(quantity, Decimal(step.get("up_to", quantity))) - below)
        total += inside * Decimal(step["unit_amount"])
        total += Decimal(step["flat_amount"]) if inside or index == 0 else 0
        below = Decimal(step.get("up_to", quantity))
    assert Rate.from_dict(plain).amount(quantity) == total


@given(
    st.decimals(min_value=0, max_value=10**18 - 1, places=12),
    st.decimals(min_value=0, max_value=10**18 - 1, places=12),
)
def test_no_digit_is_lost_at_the_largest_numbers(quantity: Decimal, price: Decimal) -> None:
    assert Fraction(per_unit(as_text(price)).amount(quantity)) == Fraction(quantity) * Fraction(price)
    step = {"unit_amount": as_text(price)}
    assert Fraction(graduated(step).amount(quantity)) == Fraction(quantity) * Fraction(price)


def test_the_callers_decimal_context_changes_nothing() -> None:
    with localcontext(prec=3):
        assert per_unit("2.50", per=1_000_000).amount(18_059_974) == Decimal("45.149935")


@given(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**20), max_value=10**20, places=6),
    st.sampled_from(sorted(CURRENCIES)),
)
def test_money_rounds_half_away_from_zero(exact: Decimal, currency: str) -> None:
    rounded = round_money(exact, currency)
    assert Fraction(rounded) == obvious_rounding(Fraction(exact), minor_digits(currency))
    assert rounded.as_tuple().exponent == -minor_digits(currency)


@pytest.mark.parametrize(
    ("exact", "currency", "expected"),
    [
        ("0.005", "USD", "0.01"),
        ("-0.005", "USD", "-0.01"),
        ("2.675", "EUR", "2.68"),
        ("-0.004", "USD", "0.00"),
        ("-0", "USD", "0.00"),
        ("0.5", "JPY", "1"),
        ("1.0005", "KWD", "1.001"),
        ("7", "USD", "7.00"),
    ],
)
def test_rounding_examples(exact: str, currency: str, expected: str) -> None:
    assert str(round_money(Decimal(exact), currency)) == expected


def test_minor_digits_follow_iso_4217() -> None:
    assert {code: minor_digits(code) for code in ("USD", "JPY", "ISK", "HUF", "KWD", "IQD")} == {
        "USD": 2,
        "JPY": 0,
        "ISK": 0,
        "HUF": 2,
        "KWD": 3,
        "IQD": 3,
    }


@pytest.mark.parametrize("code", ["usd", "XTS", "XAU", "DEM", "US", "", "CLF"])
def test_what_is_not_a_currency_is_refused(code: str) -> None:
    with pytest.raises(ValueError, match="not an active ISO 4217 currency"):
        minor_digits(code)


def test_an_endless_quotient_keeps_forty_decimals() -> None:
    assert quotient(Decimal(1), 3) == Decimal("0." + "3" * 40)
    assert quotient(Decimal(1), 2**30) * 2**30 == 1


def per_unit(unit_amount: str, **more: Any) -> Rate:
    return Rate.from_dict({"metric": "quantity", "type": "per_unit", "unit_amount": unit_amount, **more})


def graduated(*steps: dict[str, Any], **more: Any) -> Rate:
    return Rate.from_dict({"metric": "quantity", "type": "graduated", "tiers": list(steps), **more})


def volume(*steps: dict[str, Any]) -> Rate:
    return Rate.from_dict({"metric": "quantity", "type": "volume", "tiers": list(steps)})


TWO_TIERS = (
    {"up_to": 1000, "unit_amount": "0.01", "flat_amount": "5"},
    {"unit_amount": "0.004", "flat_amount": "2"},
)


@pytest.mark.parametrize(
    ("rate", "quantity", "expected"),
    [
        (per_unit("2.50", per=1_000_000), 18_059_974, "45.149935"),
        (per_unit("10.00", per=1_000_000), 245_896, "2.45896"),
        (per_unit("1", included=10), 10, "0"),
        (per_unit("1", included=10), 11, "1"),
        (per_unit("1", minimum="7"), 0, "7"),
        (per_unit("1", maximum="7"), 100, "7"),
        (graduated(*TWO_TIERS), 0, "5"),
        (graduated(*TWO_TIERS), 1000, "15"),
        (graduated(*TWO_TIERS), 1001, "17.004"),
        (volume(*TWO_TIERS), 0, "5"),
        (volume(*TWO_TIERS), 1000, "15"),
        (volume(*TWO_TIERS), 1001, "6.004"),
    ],
)
def test_price_examples(rate: Rate, quantity: int, expected: str) -> None:
    assert rate.amount(quantity) == Decimal(expected)


def test_a_started_package_is_billed() -> None:
    rate = Rate.from_dict(
        {"metric": "quantity", "type": "package", "package_size": 100, "package_amount": "12.00", "free_units": 50}
    )
    amounts = [rate.amount(q) for q in (0, 50, Decimal("50.5"), 150, 151)]
    assert amounts == [0, 0, 12, 12, 24]


def test_cost_plus_and_flat() -> None:
    assert Rate.from_dict({"type": "cost_plus", "markup_percent": 20}).amount(Decimal("1.23")) == Decimal("1.476")
    assert Rate.from_dict({"type": "cost_plus", "markup_percent": "20"}).metric == "cost"
    assert Rate.from_dict({"type": "flat", "amount": "25.00"}).amount(0) == 25


@pytest.mark.parametrize(
    "quantity", [-1, Decimal("-0.5"), Decimal("NaN"), Decimal("sNaN"), Decimal("Infinity"), 1.0, True, "1", None]
)
def test_what_is_not_a_quantity_is_refused(quantity: Any) -> None:
    with pytest.raises(InvalidEvent) as caught:
        per_unit("1").amount(quantity)
    assert caught.value.field == "quantity"


def test_metered_only_leaves_nothing_that_is_due_once() -> None:
    rate = graduated(*TWO_TIERS, included=10, minimum="7", maximum="900").metered_only()
    assert rate is not None
    assert rate.amount(0) == 0
    assert rate.amount(1001) == Decimal("10.004")
    assert rate.amount(10_000_000) == 900
    package = Rate.from_dict(
        {"metric": "requests", "type": "package", "package_size": 10, "package_amount": "1", "free_units": 50}
    ).metered_only()
    assert package is not None
    assert package.amount(11) == 2
    assert Rate.from_dict({"type": "flat", "amount": "25.00"}).metered_only() is None


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"type": "per_unit", "metric": "requests"}, "rate"),
        ({"type": "per_unit", "unit_amount": "1"}, "rate"),
        ({"type": "per_units", "metric": "requests", "unit_amount": "1"}, "rate.type"),
        ({"type": "per_unit", "metric": "spend", "unit_amount": "1"}, "rate.metric"),
        ({"type": "cost_plus", "metric": "requests", "markup_percent": 1}, "rate.metric"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": 0.5}, "rate.unit_amount"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "NaN"}, "rate.unit_amount"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "1e3"}, "rate.unit_amount"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "-1"}, "rate.unit_amount"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": True}, "rate.unit_amount"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "0.0000000000001"}, "rate.unit_amount"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "1", "per": 0}, "rate.per"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "1", "tiers": []}, "rate.tiers"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "1", "match": {"modle": "x"}}, "rate.match.modle"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "1", "match": {"model": ""}}, "rate.match.model"),
        ({"type": "per_unit", "metric": "requests", "unit_amount": "1", "line": ""}, "rate.line"),
        ({"type": "flat", "amount": "1", "minimum": "3", "maximum": "2"}, "rate.minimum"),
        ({"type": "package", "metric": "requests", "package_amount": "1", "package_size": 0}, "rate.package_size"),
        ({"type": "volume", "metric": "requests", "tiers": []}, "rate.tiers"),
        ({"type": "volume", "metric": "requests", "tiers": {}}, "rate.tiers"),
        ({"type": "volume", "metric": "requests", "tiers": [{}]}, "rate.tiers[0]"),
        ({"type": "volume", "metric": "requests", "tiers": [{"up_to": 5, "unit_amount": "1"}]}, "rate.tiers[0].up_to"),
        ({"type": "volume", "metric": "requests", "tiers": [{"unit_amount": "1"}] * 2}, "rate.tiers[0]"),
        (
            {
                "type": "graduated",
                "metric": "requests",
                "tiers": [{"up_to": 5, "unit_amount": "1"}, {"up_to": 5, "unit_amount": "1"}, {"unit_amount": "1"}],
            },
            "rate.tiers[1].up_to",
        ),
        ([], "rate"),
    ],
)
def test_what_is_not_a_rate_is_refused_by_name(document: Any, where: str) -> None:
    with pytest.raises(InvalidPlan) as caught:
        Rate.from_dict(document)
    assert caught.value.where == where


def test_a_rate_made_in_code_is_checked_too() -> None:
    rate = Rate(type="per_unit", metric="requests", unit_amount=Decimal("0.10"), match=Match(model="gpt-*"))
    assert rate.amount(3) == Decimal("0.30")
    with pytest.raises(InvalidPlan, match="a float is not exact"):
        Rate(type="per_unit", metric="requests", unit_amount=0.1)  # type: ignore[arg-type]


def test_rates_say_what_they_are_for() -> None:
    assert str(per_unit("1")) == "All lines: units"
    assert str(Rate.from_dict({"line": "application", "type": "flat", "amount": "1"})) == "application: flat fee"
    assert (
        str(per_unit("1", line="application", metric="input_tokens", match={"model": "gpt-4.1*"}))
        == "application: input tokens, gpt-4.1*"
    )
    assert (
        str(Rate.from_dict({"type": "cost_plus", "markup_percent": "12.50"})) == "All lines: provider cost plus 12.5%"
    )


def test_a_thirteenth_decimal_is_refused_however_long_the_number() -> None:
    with pytest.raises(InvalidPlan, match="at most 12 decimals"):
        per_unit("123456789012345678.1234567890123")


def test_zero_is_written_in_one_way() -> None:
    documents = [per_unit(zero, minimum=zero).to_dict() for zero in ("0", "-0", "0.00")]
    assert documents[0]["minimum"] == "0"
    assert documents == [documents[0]] * 3
