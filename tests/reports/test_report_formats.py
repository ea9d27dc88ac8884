from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metering.billing.money import quotient
from reports import formats

LEDGER_NUMBERS = st.decimals(min_value=-(10**18), max_value=10**18, places=12)


@given(LEDGER_NUMBERS)
def test_no_digit_of_a_ledger_number_is_lost(value: Decimal) -> None:
    assert Decimal(formats.number(value).replace(",", "")) == value
    assert Decimal(formats.amount(value, "USD").replace(",", "")) == value
    assert Decimal(formats.plain(value, 2)) == value


@given(LEDGER_NUMBERS)
def test_plain_digits_are_digits_a_spreadsheet_reads(value: Decimal) -> None:
    assert set(formats.plain(value)) <= set("-0123456789.")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (18_059_974, "18,059,974"),
        (Decimal("2310.500"), "2,310.5"),
        (Decimal("1E+6"), "1,000,000"),
        (Decimal("-0.00"), "0"),
        (-1234, "-1,234"),
    ],
)
def test_numbers(value: int | Decimal, words: str) -> None:
    assert formats.number(value) == words


@pytest.mark.parametrize(
    ("value", "currency", "words"),
    [
        (Decimal("1234.5"), "USD", "1,234.50 USD"),
        (Decimal("0.0000025"), "USD", "0.0000025 USD"),
        (Decimal("-5"), "EUR", "-5.00 EUR"),
        (Decimal("1200.00"), "JPY", "1,200 JPY"),
        (Decimal("1.5"), "KWD", "1.500 KWD"),
        (Decimal("1.5"), "LBP", "1.50 LBP"),  # ISO 4217 has two decimals, CLDR none
    ],
)
def test_money_shows_the_minor_digits_and_whatever_is_beyond(value: Decimal, currency: str, words: str) -> None:
    assert formats.money(value, currency) == words


@pytest.mark.parametrize(
    ("value", "words"), [("2.345", "2.35"), ("-2.345", "-2.35"), ("-0.004", "0.00"), ("7", "7.00")]
)
def test_overviews_round_half_away_from_zero(value: str, words: str) -> None:
    assert formats.rounded(Decimal(value), "USD") == words


def test_sums_keep_digits_beyond_the_default_context() -> None:
    large, small = Decimal(10) ** 25, Decimal("0.000000000001")
    assert large + small == large  # in the default context
    assert formats.plain(formats.exact_sum([large, small])) == "10000000000000000000000000.000000000001"
    assert formats.exact_sum([]) == 0


@pytest.mark.parametrize(("value", "words"), [(512, "512"), (8_819, "8.8K"), (18_059_974, "18.1M"), (2 * 10**9, "2B")])
def test_short_numbers(value: int, words: str) -> None:
    assert formats.short(value) == words


def test_percent() -> None:
    assert formats.percent(Decimal(1), Decimal(3)) == "33.3%"
    assert formats.percent(Decimal(-1), Decimal(8)) == "-12.5%"
    assert formats.percent(Decimal(1), Decimal(0)) is None


def test_days_are_local_and_the_last_one_is_included() -> None:
    start, end = datetime(2023, 10, 31, 18, 30, tzinfo=UTC), datetime(2023, 11, 30, 18, 30, tzinfo=UTC)
    assert formats.days_of(start, end, "Asia/Kolkata") == "1 November 2023 to 30 November 2023"
    assert formats.days_of(start, end, "UTC") == "31 October 2023 to 30 November 2023"
    noon = datetime(2023, 11, 1, 12, tzinfo=UTC)
    assert formats.days_of(noon, datetime(2023, 11, 2, tzinfo=UTC), "UTC") == formats.day(date(2023, 11, 1))


def test_a_quotient_that_never_ends_is_cut_and_marked() -> None:
    assert formats.cut(quotient(Decimal(-245), 9), "USD") == "-27.222222222222\N{HORIZONTAL ELLIPSIS}"
    assert formats.cut(Decimal("0.000000000001"), "USD") == "0.000000000001"
    assert formats.cut(Decimal(49), "USD") == "49.00"
    assert formats.amount(quotient(Decimal(245), 9), "USD") == "27." + "2" * 40
