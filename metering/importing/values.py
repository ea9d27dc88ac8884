"""What files write, as the values events hold. Every refusal names the field, the value and what was expected."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any
from uuid import UUID

import msgspec

from metering.errors import InvalidEvent

__all__ = ["FIELDS", "is_blank", "parse_instant", "parse_quantity", "parse_whole"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Seconds of 2001 to 2286 have 10 digits, milliseconds 13: neither can be a date such as 20231116 or 202311161817.
_FIRST_SECOND, _LAST_SECOND = Decimal(10) ** 9, Decimal(10) ** 10
_FIRST_YEAR, _LAST_YEAR = 1970, 2286

_TIME = "a time such as 2023-11-16T18:17:03Z, or epoch seconds or milliseconds"
_MAX_WHOLE = 2**63

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(decimal_format="number").encode


def is_blank(value: Any) -> bool:
    """Whether a cell says nothing."""
    return value is None or value == ""


def parse_instant(field: str, value: Any) -> tuple[datetime, bool]:
    """A time, in UTC, and whether the file gave it no zone (it is then read as UTC).

    ISO 8601 with any number of fractional digits (beyond microseconds they are cut off), with an offset, `Z` or none;
    epoch seconds, with or without fraction, and epoch milliseconds; `datetime` and `date` objects.
    """
    at = value
    if isinstance(value, str):
        number = _number(value)
        if number is not None:
            return _from_epoch(field, value, number), False
        try:
            at = datetime.fromisoformat(value.strip())
        except ValueError:
            raise InvalidEvent(field, value, _TIME) from None
    elif not isinstance(value, date):
        number = _exact(value)
        if number is None:
            raise InvalidEvent(field, value, _TIME)
        return _from_epoch(field, value, number), False
    elif not isinstance(value, datetime):
        at = datetime(value.year, value.month, value.day)  # noqa: DTZ001  made aware below
    if not _FIRST_YEAR <= at.year <= _LAST_YEAR:
        raise InvalidEvent(field, value, f"a time of the years {_FIRST_YEAR} to {_LAST_YEAR}")
    if at.tzinfo is None:
        return at.replace(tzinfo=UTC), True
    return at.astimezone(UTC), False


def parse_whole(field: str, value: Any) -> int:
    """A whole number: `812`, 812 or 812.0."""
    number = _number(value) if isinstance(value, str) else _exact(value)
    if number is None or not number.is_finite() or number != number.to_integral_value():
        raise InvalidEvent(field, value, "a whole number")
    if abs(number) >= _MAX_WHOLE:
        raise InvalidEvent(field, value, "a whole number below 2^63")
    return int(number)


def parse_quantity(field: str, value: Any) -> Decimal:
    """A quantity, exactly as written; a binary float counts as the shortest decimal that means it."""
    number = _number(value) if isinstance(value, str) else _exact(value)
    if number is None:
        raise InvalidEvent(field, value, "a decimal number")
    return number


def parse_bool(field: str, value: Any) -> bool:
    """True or false."""
    if isinstance(value, bool):
        return value
    known = {"true": True, "1": True, "false": False, "0": False}
    try:
        return known[str(value).strip().lower()]
    except KeyError:
        raise InvalidEvent(field, value, "true or false") from None


def parse_attributes(field: str, value: Any) -> dict[str, Any]:
    """A JSON object, or text that is one."""
    try:
        attributes = _decode(value if isinstance(value, str) else _encode(value))
    except (msgspec.DecodeError, TypeError, RecursionError):
        raise InvalidEvent(field, value, "a JSON object") from None
    if not isinstance(attributes, dict):
        raise InvalidEvent(field, value, "a JSON object")
    return attributes


def parse_name(field: str, value: Any) -> str:
    """Text as it stands, a whole number as its digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise InvalidEvent(field, value, "text in UTF-8") from None
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, float):  # an id that went through a float may have lost its last digits
        raise InvalidEvent(field, value, "text or a whole number")
    try:
        return str(parse_whole(field, value))
    except InvalidEvent as exc:
        raise InvalidEvent(field, value, "text or a whole number") from exc


FIELDS: dict[str, Any] = {
    "account": parse_name,
    "plan": parse_name,
    "line": parse_name,
    "operation": parse_name,
    "provider": parse_name,
    "model": parse_name,
    "service_tier": parse_name,
    "run_id": parse_name,
    "request_id": parse_name,
    "session_id": parse_name,
    "caller_type": parse_name,
    "error": parse_name,
    "idempotency_key": parse_name,
    "occurred_at": parse_instant,
    "quantity": parse_quantity,
    "input_tokens": parse_whole,
    "cache_read_tokens": parse_whole,
    "cache_write_tokens": parse_whole,
    "cache_write_1h_tokens": parse_whole,
    "input_audio_tokens": parse_whole,
    "output_tokens": parse_whole,
    "reasoning_tokens": parse_whole,
    "output_audio_tokens": parse_whole,
    "latency_ms": parse_whole,
    "platform_paid": parse_bool,
    "attributes": parse_attributes,
}
"""What a column may be mapped to, and how its cells are read."""


def _number(text: str) -> Decimal | None:
    if not text.isascii() or "_" in text:
        return None
    try:
        return Decimal(text.strip())
    except InvalidOperation:
        return None


def _exact(value: Any) -> Decimal | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float):
        return Decimal(repr(value))
    return Decimal(value) if isinstance(value, int | Decimal) else None


def _from_epoch(field: str, value: Any, number: Decimal) -> datetime:
    if number.is_finite():
        for seconds in (number, number / 1000):
            if _FIRST_SECOND <= seconds < _LAST_SECOND:
                return _EPOCH + timedelta(microseconds=int(seconds * 1_000_000))
    raise InvalidEvent(field, value, f"{_TIME} of the years 2001 to {_LAST_YEAR}")
