"""HTTP headers, and what stands in them: counts, amounts, fractions, durations and moments (pure).

Fractions and amounts are exact, and lean on no decimal context of an app.

Each reader of a text raises `ValueError`, whose message is what was expected.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from email.utils import parsedate_to_datetime
from fractions import Fraction
from typing import TYPE_CHECKING, Any, cast

from metering.checks import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HeaderMap",
    "amount",
    "count",
    "duration",
    "epoch",
    "epoch_ms",
    "fields",
    "fraction",
    "http_date",
    "instant",
    "named_items",
    "seconds",
]

HeaderMap = Mapping[Any, Any] | Iterable[tuple[Any, Any]]
"""Anything that has headers: a mapping, `httpx.Headers`, pairs; names and values as str or bytes."""

MAX_VALUE = 256
"""Characters of a value that is read."""
MAX_AMOUNT = Decimal(10) ** 15
LAST_PLACE = Decimal(10) ** -12
"""Of an amount: the ledger keeps no more."""
MAX_DAYS = 3_660
"""Ten years: what is said to take longer, or to be farther away, is taken for a mistake."""
LAST_YEAR = 9_000
FIRST_EPOCH = 10**9
"""2001: what is less counts seconds from now, or something else."""

_ROUNDED = Context(prec=60)

_COUNT = re.compile(r"(\d{1,3}(?:,\d{3})+|\d{1,17})(?:\.\d*)?", re.ASCII)
_AMOUNT = re.compile(r"\d{1,15}(?:\.\d{0,20})?(?:[eE][+-]?\d{1,2})?", re.ASCII)
_ITEM = r'"[^"\\,;]{1,40}"(?:; *(?:"[^"\\,;]{1,40}"|[a-z]{1,10}=[0-9]{1,17}))*'
_ITEMS = re.compile(f"{_ITEM}(?: *, *{_ITEM})*", re.ASCII)
_NUMBER = re.compile(r"\d{1,17}(?:\.\d{0,17})?|\.\d{1,17}", re.ASCII)
_TERM = r"(\d{1,17}(?:\.\d{0,17})?|\.\d{1,17})(ns|us|µs|μs|ms|s|m|h|d)"
_DURATION = re.compile(f"(?:{_TERM})+", re.ASCII)
_MICROSECONDS = {
    "ns": Fraction(1, 1_000),
    **dict.fromkeys(("us", "µs", "μs"), Fraction(1)),
    "ms": Fraction(10**3),
    "s": Fraction(10**6),
    "m": Fraction(60 * 10**6),
    "h": Fraction(3_600 * 10**6),
    "d": Fraction(86_400 * 10**6),
}


def fields(headers: HeaderMap) -> dict[str, list[str | None]]:
    """The values of each name in lower case, in their order, each of them once; None for a value that is no text."""
    found: dict[str, list[str | None]] = {}
    for name, value in _pairs(headers):
        key = _text(name)
        if key is None:
            continue
        values = found.setdefault(key.strip().lower(), [])
        for each in value if isinstance(value, list | tuple) else (value,):
            text = _text(each)
            text = None if text is None else text.strip()
            if text not in values:
                values.append(text)
    return found


def _pairs(headers: Any) -> Iterator[tuple[Any, Any]]:
    # httpx.Headers joins what came twice with a comma, unless it is asked for all of it.
    all_items = getattr(headers, "multi_items", None) or getattr(headers, "items", None)
    for item in all_items() if callable(all_items) else headers:
        if isinstance(item, list | tuple) and len(item) == 2:
            yield cast("tuple[Any, Any]", tuple(item))


def _text(value: object) -> str | None:
    if isinstance(value, bytes | bytearray):
        return value.decode("latin-1")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value) if abs(value) <= MAX_TOKENS else None
    return value if isinstance(value, str) else None


def count(text: str) -> int:
    """A whole number from 0 to 2^53, also with thousands separators; decimals are cut off."""
    match = _COUNT.fullmatch(text)
    number = int(match[1].replace(",", "")) if match and len(text) <= MAX_VALUE else -1
    if not 0 <= number <= MAX_TOKENS:
        raise ValueError(f"a number from 0 to {MAX_TOKENS}")
    return number


def amount(text: str) -> Decimal:
    """Money, from 0 to below 10^15, to 12 places; what is less than half of the last one is none, not nothing."""
    if _AMOUNT.fullmatch(text):
        number = Decimal(text)
        if number < MAX_AMOUNT:
            rounded = number.quantize(LAST_PLACE, context=_ROUNDED)
            if rounded == number:
                return number
            if rounded:
                return rounded
    raise ValueError("an amount from 0 to below 10^15, of 12 places")


def named_items(text: str) -> dict[str, dict[str, str]]:
    """Items with numbers as parameters (draft-ietf-httpapi-ratelimit-headers, RFC 9651), by name.

    Of an item with two names, such as `"fixed window";"api";q=500`, the last one is its name.
    """
    if len(text) > MAX_VALUE or not _ITEMS.fullmatch(text):
        raise ValueError('items such as "api";r=999;t=295')
    found: dict[str, dict[str, str]] = {}
    for item in text.split(","):
        pieces = [piece.strip() for piece in item.split(";")]
        name = [piece for piece in pieces if "=" not in piece][-1].strip('"')
        found[name] = dict(piece.split("=", 1) for piece in pieces if "=" in piece)
    return found


def fraction(text: str) -> Fraction:
    """What is used of 1, below 1,000."""
    if not _NUMBER.fullmatch(text) or Fraction(text) >= 1_000:
        raise ValueError("a fraction of 1")
    return Fraction(text)


def seconds(text: str) -> Fraction:
    """Seconds, or a part of one, up to ten years."""
    if not _NUMBER.fullmatch(text) or Fraction(text) > MAX_DAYS * 86_400:
        raise ValueError("a number of seconds")
    return Fraction(text)


def duration(text: str) -> timedelta:
    """As Go writes it (https://pkg.go.dev/time#ParseDuration), such as 1h2m3.5s, also with days; up to ten years."""
    if text == "0":
        return timedelta()
    if len(text) > MAX_VALUE or not _DURATION.fullmatch(text):
        raise ValueError("a duration such as 6m0s")
    microseconds = sum(Fraction(number) * _MICROSECONDS[unit] for number, unit in re.findall(_TERM, text, re.ASCII))
    if microseconds > MAX_DAYS * _MICROSECONDS["d"]:
        raise ValueError(f"a duration of at most {MAX_DAYS} days")
    return timedelta(microseconds=int(microseconds))


def instant(text: str) -> datetime:
    """A time with an offset (RFC 3339), in UTC."""
    try:
        return _in_utc(datetime.fromisoformat(text.upper()))
    except (ValueError, OverflowError):
        raise ValueError("a time with an offset, as in RFC 3339") from None


def epoch(text: str) -> datetime:
    """Seconds since 1970, from 2001 on."""
    try:
        if _NUMBER.fullmatch(text) and Fraction(text) >= FIRST_EPOCH:
            return _in_utc(datetime.fromtimestamp(int(Fraction(text)), UTC))
    except (ValueError, OverflowError, OSError):
        pass
    raise ValueError("seconds since 1970")


def epoch_ms(text: str) -> datetime:
    """Milliseconds since 1970, from 2001 on."""
    try:
        if text.isascii() and text.isdigit() and len(text) <= MAX_VALUE:
            since_1970, milliseconds = divmod(int(text), 1_000)
            return epoch(str(since_1970)) + timedelta(milliseconds=milliseconds)
    except ValueError:
        pass
    raise ValueError("milliseconds since 1970")


def http_date(text: str) -> datetime:
    """A date as in RFC 9110, 5.6.7."""
    try:
        date = parsedate_to_datetime(text[:MAX_VALUE])
        return _in_utc(date.replace(tzinfo=date.tzinfo or UTC))
    except (ValueError, OverflowError, TypeError, IndexError):
        raise ValueError("a date as in RFC 9110") from None


def _in_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None or moment.year > LAST_YEAR:
        raise ValueError(moment)
    return moment.astimezone(UTC)
