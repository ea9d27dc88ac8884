"""How numbers, money and days are written for people (en_US) and for spreadsheets."""

from __future__ import annotations

from datetime import timedelta
from decimal import ROUND_DOWN, ROUND_HALF_UP, Context, Decimal, Inexact, localcontext
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo

from babel.dates import format_date
from babel.numbers import format_compact_decimal, format_decimal

from metering.billing.money import EXACT, minor_digits, round_money

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import date, datetime

__all__ = [
    "amount",
    "cell",
    "cut",
    "day",
    "days_of",
    "exact_sum",
    "money",
    "number",
    "percent",
    "plain",
    "rounded",
    "short",
]

LOCALE = "en_US"
MAX_SHOWN_PLACES = 12
"""A quotient that never ends has 40 decimals; a page shows the first of them."""

# What spreadsheets take for the start of a formula, or skip on their way to one (OWASP, CSV injection).
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")


def cell(value: str | None) -> str:
    """A text that no spreadsheet executes."""
    value = value or ""
    return f"'{value}" if value.startswith(_FORMULA_STARTS) else value


def plain(value: int | Decimal, places: int = 0) -> str:
    """Digits a spreadsheet reads: `1234.5`. Exact, no separators or exponent, at least `places` decimals."""
    return f"{_padded(value, places):f}"


def number(value: int | Decimal) -> str:
    """`18,059,974`, `1,234.5`. Exact: no digit is dropped but trailing zeros."""
    return _grouped(_padded(value, 0))


def amount(value: Decimal, currency: str) -> str:
    """Money without its currency, exact: at least the currency's minor digits, more where there are more."""
    return _grouped(_padded(value, minor_digits(currency)))


def money(value: Decimal, currency: str) -> str:
    """`1,234.50 USD`, exact as in `amount`."""
    return f"{amount(value, currency)} {currency}"


def cut(value: Decimal, currency: str) -> str:
    """As `amount`, with what is beyond 12 decimals left out and marked: `27.766666666666…`."""
    with localcontext(EXACT) as context:
        context.traps[Inexact] = False
        short_value = value.quantize(Decimal(1).scaleb(-MAX_SHOWN_PLACES), ROUND_DOWN)
    if short_value == value:
        return amount(value, currency)
    return f"{_grouped(short_value)}\N{HORIZONTAL ELLIPSIS}"


def rounded(value: Decimal, currency: str) -> str:
    """Money without its currency, rounded half away from zero to the minor unit. For overviews, never for invoices."""
    return amount(round_money(value, currency), currency)


def exact_sum(values: Iterable[Decimal]) -> Decimal:
    """The sum with all its digits; 0 of nothing."""
    with localcontext(EXACT):
        return sum(values, Decimal(0))


def short(value: int) -> str:
    """`18.1M`, `8.8K`, `512`: one decimal at most."""
    return str(format_compact_decimal(value, locale=LOCALE, fraction_digits=1))


def percent(part: Decimal, whole: Decimal) -> str | None:
    """`part` of `whole` to one decimal, such as `41.2%`; None where `whole` is 0."""
    if not whole:
        return None
    with localcontext(Context(prec=EXACT.prec)):
        return f"{_grouped((100 * part / whole).quantize(Decimal('0.1'), ROUND_HALF_UP))}%"


def day(value: date) -> str:
    """`1 November 2023`."""
    return str(format_date(value, "d MMMM y", locale=LOCALE))


def days_of(start: datetime, end: datetime, time_zone: str) -> str:
    """The days of `[start, end)` in `time_zone`, last day included: `1 November 2023 to 30 November 2023`."""
    zone = ZoneInfo(time_zone)
    first = start.astimezone(zone).date()
    last = (end - timedelta(microseconds=1)).astimezone(zone).date()
    return day(first) if first == last else f"{day(first)} to {day(last)}"


def _padded(value: int | Decimal, places: int) -> Decimal:
    """`value` with its trailing zeros cut down to `places` decimals, and never a negative zero."""
    with localcontext(EXACT):
        exact = (Decimal(value) + 0).normalize()
        exponent = exact.as_tuple().exponent
        assert isinstance(exponent, int)
        return exact.quantize(Decimal(1).scaleb(min(exponent, -places))) if exact else Decimal(0).scaleb(-places)


def _grouped(value: Decimal) -> str:
    exponent = value.as_tuple().exponent
    assert isinstance(exponent, int)
    with localcontext(EXACT):
        return str(format_decimal(value, format=f"#,##0.{'0' * -exponent}", locale=LOCALE))
