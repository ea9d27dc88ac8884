"""How values lie in the ledger. SQLite has no exact numeric and no time type: both are text there.

On Postgres they have their own types, and our connections tell and take them as the same texts (see `postgres`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy import Dialect, Numeric, String, Text
from sqlalchemy.dialects.postgresql import TIMESTAMP
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = [
    "INSTANT_LENGTH",
    "ExactDecimal",
    "UtcDateTime",
    "Uuid",
    "WholeNumber",
    "can_be_name",
    "decimal_text",
    "instant_text",
    "parse_instant",
]

INSTANT_LENGTH = 27
PLACES = 12


def instant_text(at: datetime) -> str:
    """An aware datetime as fixed-width text that sorts by time: `2023-11-16T18:17:03.979960Z`."""
    return _utc_text(at if at.tzinfo is UTC else at.astimezone(UTC))


@lru_cache(maxsize=256)
def _utc_text(at: datetime) -> str:
    # Remembered because one call needs the same few instants many times. In UTC equal times are one instant.
    return at.isoformat(timespec="microseconds")[:-6] + "Z"


def parse_instant(text: str) -> datetime:
    """The datetime that `instant_text` wrote."""
    return datetime.fromisoformat(text)


def can_be_name(value: object) -> bool:
    """Whether it is worth looking for. Postgres refuses to look for a number, NUL or half a surrogate pair in text."""
    return isinstance(value, str) and value.isprintable()


def decimal_text(value: Decimal | int) -> str:
    """A number as plain text in its shortest form: no exponent, no trailing zeros, no -0."""
    if isinstance(value, int):
        return str(value)
    if not value:
        return "0"
    text = format(value, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC datetime. A naive one is refused."""

    impl = String(INSTANT_LENGTH)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(TIMESTAMP(timezone=True))
        return dialect.type_descriptor(String(INSTANT_LENGTH))

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"naive datetime {value!r}: the ledger keeps aware UTC times")
        return value.astimezone(UTC) if dialect.name == "postgresql" else instant_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        return None if value is None else parse_instant(value)


class ExactDecimal(TypeDecorator[Decimal]):
    """A Decimal that comes back digit for digit: text on SQLite, numeric(38,12) on Postgres."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(Numeric(38, PLACES))
        return dialect.type_descriptor(Text())

    def process_bind_param(self, value: Decimal | int | None, dialect: Dialect) -> Any:
        if value is None:
            return None
        text = decimal_text(value)
        if dialect.name != "postgresql":
            return text
        if len(text.partition(".")[2]) > PLACES:
            raise ValueError(f"{text}: Postgres would round it, the ledger there keeps {PLACES} decimals")
        return value

    def process_result_value(self, value: str | None, dialect: Dialect) -> Decimal | None:  # noqa: ARG002
        return None if value is None else Decimal(value)


class WholeNumber(TypeDecorator[Decimal]):
    """A whole Decimal of any size: text on SQLite, numeric on Postgres."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Numeric() if dialect.name == "postgresql" else Text())

    def process_bind_param(self, value: Decimal | int | None, dialect: Dialect) -> Any:  # noqa: ARG002
        return None if value is None else decimal_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Decimal | None:  # noqa: ARG002
        return None if value is None else Decimal(value)


class Uuid(TypeDecorator[UUID]):
    """A UUID: 32 hex digits on SQLite, uuid on Postgres."""

    impl = sa.Uuid
    cache_ok = True

    def process_result_value(self, value: UUID | str | None, dialect: Dialect) -> UUID | None:  # noqa: ARG002
        return UUID(value) if isinstance(value, str) else value
