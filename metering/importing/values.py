"""What files write, as the values events hold. Every refusal names the field, the value and what was expected."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from metering.errors import InvalidEvent

__all__ = ["FIELDS", "is_blank", "parse_instant", "parse_quantity", "parse_whole", "raw_text"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_SECOND = Decimal(10) ** 8
_FIRST_MILLISECOND = Decimal(10) ** 11
_LAST_MILLISECOND = Decimal(10) ** 14


def is_blank(value: Any) -> bool:
    """Whether a cell says nothing."""
    return value is None or value == "" or (isinstance(value, float) and value != value)  # noqa: PLR0124  NaN


def raw_text(value: Any) -> str:
    """A cell as text for a row's identity; equal cells give equal text."""
    if isinstance(value, str):
        return value
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, dict | list):
        return msgspec.json.encode(value, order="sorted").decode()
    return repr(value)


def parse_instant(field: str, value: Any) -> tuple[datetime, bool]:
    """A time, in UTC, and whether the file gave it no zone (it is then read as UTC).

    ISO 8601 with any number of fractional digits (beyond microseconds they are cut off), with an offset, `Z` or none;
    epoch seconds, with or without fraction, and epoch milliseconds; `datetime` and `date` objects.
    """
    if isinstance(value, str):
        value = value.strip()
        number = _number(value)
        if number is not None:
            return _from_epoch(field, value, number), False
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise InvalidEvent(field, value, "a time such as 2023-11-16T18:17:03Z, or epoch seconds") from None
    elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return _from_epoch(field, value, Decimal(repr(value)) if isinstance(value, float) else Decimal(value)), False
    elif isinstance(value, date) and not isinstance(value, datetime):
        value = datetime(value.year, value.month, value.day)  # noqa: DTZ001  made aware below
    if not isinstance(value, datetime):
        raise InvalidEvent(field, value, "a time such as 2023-11-16T18:17:03Z, or epoch seconds")
    if value.tzinfo is None:
        return value.replace(tzinfo=UTC), True
    return value.astimezone(UTC), False


def parse_whole(field: str, value: Any) -> int:
    """A whole number: `812`, 812 or 812.0."""
    if is_blank(value):
        return 0
    if type(value) is int:
        return value
    number = _number(value) if isinstance(value, str) else _exact(value)
    if number is None or number != number.to_integral_value():
        raise InvalidEvent(field, value, "a whole number")
    return int(number)


def parse_quantity(field: str, value: Any) -> Decimal:
    """A quantity, exactly as written; a binary float counts as the shortest decimal that means it."""
    if is_blank(value):
        return Decimal(0)
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
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError:
            raise InvalidEvent(field, value, "a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidEvent(field, value, "a JSON object")
    return value


def parse_name(field: str, value: Any) -> str:  # noqa: ARG001
    """Text as it stands."""
    return value if isinstance(value, str) else raw_text(value)


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
    if not text.isascii():
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
    if not number.is_finite() or not _FIRST_SECOND <= number < _LAST_MILLISECOND:
        raise InvalidEvent(field, value, "epoch seconds or milliseconds from 1973 on, or a time in ISO 8601")
    seconds = number if number < _FIRST_MILLISECOND else number / 1000
    return _EPOCH + timedelta(microseconds=int(seconds * 1_000_000))
