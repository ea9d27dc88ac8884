"""What may enter: each check returns the value in its one form or raises `InvalidEvent` naming field and value."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

from metering.errors import InvalidEvent, InvalidUsage

MAX_TOKENS = 2**53
"""Above this a JSON reader, or Lua, would lose the last digit."""

MAX_QUANTITY = Decimal(10) ** 18
QUANTITY_PLACES = 12
"""Quantities and money are kept as DECIMAL(38,12)."""


def tokens(field: str, value: object) -> int:
    """A token count: a whole number from 0 to 2^53."""
    if type(value) is not int:
        raise InvalidUsage(field, value, "a whole number of tokens")
    if not 0 <= value <= MAX_TOKENS:
        raise InvalidUsage(field, value, f"0 to {MAX_TOKENS} tokens")
    return value


def quantity(field: str, value: object) -> Decimal:
    """A quantity: an int or a Decimal, finite, not negative, at most 12 decimals. A float is not exact: refused."""
    number = Decimal(value) if type(value) is int else value
    if not isinstance(number, Decimal):
        raise InvalidEvent(field, value, "an int or a Decimal (a float is not exact)")
    if not number.is_finite():
        raise InvalidEvent(field, value, "a finite number")
    if not 0 <= number < MAX_QUANTITY:
        raise InvalidEvent(field, value, "0 or more, below 10^18")
    if number and _places(number) > QUANTITY_PLACES:
        raise InvalidEvent(field, value, f"at most {QUANTITY_PLACES} decimals")
    return number


def _places(value: Decimal) -> int:
    # Not by normalize(): it rounds to the precision of whatever context the app has set.
    _, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    zeros = 0
    while zeros < len(digits) and not digits[-1 - zeros]:
        zeros += 1
    return -exponent - zeros


def text(field: str, value: object, max_length: int) -> str:
    """A name: a string of 1 to `max_length` characters without control characters."""
    if not isinstance(value, str):
        raise InvalidEvent(field, value, "a string")
    if not 1 <= len(value) <= max_length:
        raise InvalidEvent(field, value, f"1 to {max_length} characters (got {len(value)})")
    if not value.isprintable():
        raise InvalidEvent(field, value, "printable characters only")
    return value


def instant(field: str, value: object) -> datetime:
    """A moment: an aware datetime, returned in UTC."""
    if not isinstance(value, datetime):
        raise InvalidEvent(field, value, "an aware datetime")
    if value.tzinfo is None or value.utcoffset() is None:
        raise InvalidEvent(field, value, "an aware datetime; this one has no time zone")
    return value.astimezone(UTC)
