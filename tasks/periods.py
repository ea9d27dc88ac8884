"""What a period's bills are made of: its usage as it was loaded, and what came late for closed ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from metering.accounts import list_accounts
from metering.billing.closing import PeriodInputs, adjustments
from metering.billing.invoices import UsageSum
from metering.errors import MeteringError
from metering.events import TOKEN_FIELDS
from metering.ledger import plan_versions
from metering.ledger.closing import frozen_of, taken_back
from metering.windows import period_of_month
from tasks.errors import WarehouseError
from tasks.warehouse import sql

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime

    import duckdb
    import sqlalchemy as sa

    from metering.plans import Plan

__all__ = ["INSTANT", "Loaded", "late_inputs", "late_of", "loaded", "open_inputs", "plans_of", "priceable", "rows"]

INSTANT = timedelta(microseconds=1)
AMOUNTS = ("requests", "quantity", *TOKEN_FIELDS, "cost", "unpriced_requests")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What is known of one period, by account."""

    usage: Mapping[str, list[UsageSum]]
    """What is billable."""
    events: Mapping[str, int] = field(default_factory=dict)
    """How many, billable or not."""
    price_versions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    last_seqs: Mapping[str, int] = field(default_factory=dict)
    """The highest number of an event."""
    watermark: int = 0
    """How far the ledger was loaded."""


def loaded(connection: duckdb.DuckDBPyConnection, period: str) -> Loaded:
    """What the warehouse has of a period."""
    usage: defaultdict[str, list[UsageSum]] = defaultdict(list)
    for row in rows(connection, "usage_sums", period):
        usage[row.pop("account")].append(UsageSum(**row))
    counted = rows(connection, "usage_events_by_period", period)
    watermark = connection.execute("SELECT seq FROM load_watermark").fetchone()
    return Loaded(
        usage=usage,
        events={row["account"]: row["events"] for row in counted},
        price_versions={row["account"]: tuple(row["price_versions"]) for row in counted},
        last_seqs={row["account"]: row["last_seq"] for row in counted},
        watermark=0 if watermark is None else watermark[0],
    )


def open_inputs(connection: sa.Connection, known: Loaded, period: str, now: datetime) -> list[PeriodInputs]:
    """Of each account whose period is not closed, by name; none that began later and has no usage."""
    closed = {account for account, periods in frozen_of(connection).items() if period in periods}
    plans = plans_of(connection)
    found = []
    for account in list_accounts(connection, now):
        window = period_of_month(period, time_zone=account.time_zone, anchor_day=account.anchor_day)
        # A correction may have taken all of a group back.
        usage = _billed(known.usage.get(account.account, ()))
        began_later = account.active_from is not None and account.active_from >= window.end
        if account.account in closed or (began_later and not usage):
            continue
        in_force = plan_versions.in_force(connection, account.account, window.end - INSTANT)
        assert in_force is not None
        found.append(
            PeriodInputs(
                account=account.account,
                name=account.name,
                address=account.address,
                time_zone=account.time_zone,
                active_from=account.active_from,
                period=period,
                period_start=window.start,
                period_end=window.end,
                plan_version=in_force.plan_version,
                plans=_digests(plans, {in_force.plan_version, *(row.plan_version for row in usage)}),
                price_versions=known.price_versions.get(account.account, ()),
                usage=usage,
                events=known.events.get(account.account, 0),
                watermark=known.watermark,
                last_seq=known.last_seqs.get(account.account, 0),
            )
        )
    return found


def late_inputs(connection: sa.Connection, warehouse: duckdb.DuckDBPyConnection) -> dict[str, list[PeriodInputs]]:
    """By account: the closed periods of which more is known now than was frozen, with all that is known of them.

    Raises `WarehouseError` where less is known: then what came late cannot be told from what is missing.
    """
    counts = {(row["account"], row["period"]): row["events"] for row in rows(warehouse, "usage_events_by_period", None)}
    for account, closed in frozen_of(connection).items():
        for period, (_, inputs) in closed.items():
            events = counts.get((account, period), 0)
            if events < inputs.events:
                raise WarehouseError(
                    f"the warehouse has {events:,} events of account {account!r} in {period}, but {inputs.events:,} "
                    "were billed: `python -m flows rebuild` makes it anew"
                )
    return late_of(connection, counts, lambda period: loaded(warehouse, period))


def late_of(
    connection: sa.Connection, counts: Mapping[tuple[str, str], int], known_of: Callable[[str], Loaded]
) -> dict[str, list[PeriodInputs]]:
    """The same, given how many events of each account and period are known, and what is known of a period.

    With those of which something was taken back, as they were frozen: it may be due again.
    """
    plans, again = plans_of(connection), taken_back(connection)
    late: defaultdict[str, list[PeriodInputs]] = defaultdict(list)
    known = cache(known_of)
    for account, closed in frozen_of(connection).items():
        for period, (_, inputs) in closed.items():
            events = counts.get((account, period), 0)
            if events > inputs.events:
                usage = _billed(known(period).usage.get(account, ()))
                late[account].append(
                    inputs.with_usage(
                        usage,
                        plans=_digests(plans, {row.plan_version for row in usage}),
                        price_versions=known(period).price_versions.get(account, ()),
                        events=events,
                        watermark=known(period).watermark,
                        last_seq=known(period).last_seqs.get(account, 0),
                    )
                )
            elif (account, period) in again:
                late[account].append(inputs)
    return late


def priceable(
    late: Sequence[PeriodInputs], plans: Mapping[int, Plan]
) -> tuple[list[PeriodInputs], list[tuple[str, str]]]:
    """Those that can be priced, and (account, why) of the others, which keep no invoice from being made."""
    fine, problems = [], []
    for each in late:
        try:
            adjustments(each, plans, {})
            fine.append(each)
        except MeteringError as exc:
            problems.append((each.account, f"what came late for {each.period} waits: {exc}"))
    return fine, problems


def plans_of(connection: sa.Connection) -> dict[int, Plan]:
    """Every plan version."""
    return {version.plan_version: version.plan for version in plan_versions.versions(connection)}


def rows(connection: duckdb.DuckDBPyConnection, query: str, period: str | None) -> list[dict[str, Any]]:
    """What a query of the warehouse finds, of one period or of all."""
    result = connection.execute(sql(query), {"period": period})
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _billed(usage: Iterable[UsageSum]) -> tuple[UsageSum, ...]:
    """In an order that does not depend on how it was loaded."""
    found = [row for row in usage if any(getattr(row, name) for name in AMOUNTS)]
    return tuple(sorted(found, key=_order))


def _order(row: UsageSum) -> tuple[tuple[bool, Any], ...]:
    named = (row.plan_version, row.line, row.provider, row.model, row.service_tier)
    return tuple((value is not None, value if value is not None else 0) for value in named)


def _digests(plans: Mapping[int, Plan], versions: Iterable[int]) -> dict[int, str]:
    return {version: plans[version].digest for version in sorted(versions)}
