"""Questions people ask of the ledger: how much was used, and what was said."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles

from metering.errors import InvalidSetting, UnknownAccount
from metering.events import TOKEN_FIELDS
from metering.ledger.archived import refuse_archived
from metering.ledger.schema import accounts, events, request_log
from metering.ledger.types import ExactDecimal, can_be_name

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from metering.ledger import Ledger

__all__ = ["LogEntry", "UsageBy", "UsageTotal", "request_log_of", "usage_of"]

UsageBy = Literal["line", "model", "day", "key_id", "operation"]


class _ExactSum(sa.sql.functions.GenericFunction[Decimal]):
    """`exact_sum` of SQLite connections: the sum of an `ExactDecimal`, digit for digit."""

    name = "exact_sum"
    type = ExactDecimal()
    inherit_cache = True


@compiles(_ExactSum, "postgresql")
def _sum_on_postgres(element: _ExactSum, compiler: Any, **options: Any) -> str:
    return f"sum({compiler.process(element.clauses, **options)})"


class _UtcDay(sa.sql.functions.GenericFunction[str]):
    """The day of a `UtcDateTime`, such as `2023-11-16`."""

    type = sa.String()
    inherit_cache = True


@compiles(_UtcDay)
def _day(element: _UtcDay, compiler: Any, **options: Any) -> str:
    return f"substr({compiler.process(element.clauses, **options)}, 1, 10)"


@compiles(_UtcDay, "postgresql")
def _day_on_postgres(element: _UtcDay, compiler: Any, **options: Any) -> str:
    return f"to_char({compiler.process(element.clauses, **options)}, 'YYYY-MM-DD')"


_BY: dict[str, Any] = {
    "line": events.c.line,
    "model": events.c.model,
    "key_id": events.c.key_id,
    "operation": events.c.operation,
    "day": _UtcDay(events.c.occurred_at),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotal:
    """Usage of one group, corrections included, billable or not."""

    group: str | None
    """The value grouped by; None for the whole, or where events have no such value."""
    requests: int
    quantity: Decimal
    input_tokens: int
    cache_read_tokens: int
    cache_write_tokens: int
    cache_write_1h_tokens: int
    input_audio_tokens: int
    output_tokens: int
    reasoning_tokens: int
    output_audio_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEntry:
    """One call of the request log. Bodies are what JSON said; large ones are cut, and say so."""

    logged_at: datetime
    account: str
    key_id: str | None
    line: str
    operation: str | None
    event_id: UUID | None
    """None for a call that was released unbilled."""
    request: Any
    response: Any
    error: str | None
    latency_ms: int | None


def usage_of(
    ledger: Ledger,
    account: str,
    *,
    start: datetime | None = None,
    end: datetime | None = None,
    by: UsageBy | None = None,
) -> list[UsageTotal]:
    """Usage of an account that occurred in [start, end), in one total or by a field; days are UTC.

    Raises `EventsArchived` where some of it is no longer in the ledger.
    """
    if by is not None and by not in _BY:
        raise InvalidSetting("by", by, f"one of {', '.join(_BY)}")
    group = sa.null() if by is None else _BY[by]
    query = sa.select(
        group.label("group"),
        _whole_sum(events.c.requests).label("requests"),
        sa.func.coalesce(_ExactSum(events.c.quantity), sa.literal(Decimal(0), ExactDecimal)).label("quantity"),
        *(_whole_sum(events.c[name]).label(name) for name in TOKEN_FIELDS),
    ).where(events.c.account == account)
    if start is not None:
        query = query.where(events.c.occurred_at >= start)
    if end is not None:
        query = query.where(events.c.occurred_at < end)
    if by is not None:
        query = query.group_by(group)
    with ledger.read() as connection:
        _require_account(connection, account)
        refuse_archived(connection, account, start, end)
        totals = [UsageTotal(**row) for row in connection.execute(query).mappings()]
    # Databases differ in where they put NULL, and in how they compare text.
    return sorted(totals, key=lambda total: (total.group is not None, total.group or ""))


def _whole_sum(column: sa.Column[int]) -> sa.ColumnElement[int]:
    """Cast, because the sum of a bigint is a numeric on Postgres."""
    return sa.func.coalesce(sa.cast(sa.func.sum(column), sa.BigInteger), 0)


def request_log_of(
    ledger: Ledger,
    *,
    account: str | None = None,
    key_id: str | None = None,
    start: datetime | None = None,
    end: datetime | None = None,
    limit: int = 100,
) -> list[LogEntry]:
    """Entries of an account or a key in [start, end), the newest first."""
    if account is None and key_id is None:
        raise InvalidSetting("account", None, "an account or a key_id")
    if not 1 <= limit <= 10_000:
        raise InvalidSetting("limit", limit, "1 to 10000")
    columns = [column for column in request_log.c if column.name not in ("log_id", "hold_id", "expires_at")]
    query = sa.select(*columns).order_by(request_log.c.logged_at.desc(), request_log.c.log_id.desc()).limit(limit)
    if account is not None:
        query = query.where(request_log.c.account == account)
    if key_id is not None:
        query = query.where(request_log.c.key_id == key_id if can_be_name(key_id) else sa.false())
    if start is not None:
        query = query.where(request_log.c.logged_at >= start)
    if end is not None:
        query = query.where(request_log.c.logged_at < end)
    with ledger.read() as connection:
        if account is not None:
            _require_account(connection, account)
        return [
            LogEntry(**{**row, "request": _json(row["request"]), "response": _json(row["response"])})
            for row in connection.execute(query).mappings()
        ]


def _require_account(connection: sa.Connection, account: str) -> None:
    query = sa.select(accounts.c.account).where(accounts.c.account == account)
    if not can_be_name(account) or connection.execute(query).first() is None:
        raise UnknownAccount(account)


def _json(text: str | None) -> Any:
    return None if text is None else msgspec.json.decode(text)
