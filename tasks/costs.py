"""What the provider charges for each event: computed once per event, and kept in the ledger."""

from __future__ import annotations

from decimal import Decimal
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prefect import task

from metering.events import derive_event_id
from metering.ledger import Ledger
from metering.ledger.schema import event_costs, events

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

__all__ = ["cost_events", "provider_cost"]

EVENTS_PER_COMMIT = 5_000
PLACES = Decimal(10) ** -12
_PRICED = (
    "input_tokens",
    "cache_read_tokens",
    "cache_write_tokens",
    "input_audio_tokens",
    "output_tokens",
    "output_audio_tokens",
)


@task
def cost_events(ledger_url: str, costed_at: datetime) -> int:
    """Cost every event that has no cost yet, oldest first; how many. Each batch is one transaction."""
    ledger = Ledger(ledger_url)
    costed = 0
    try:
        # Prices are looked up outside the write transaction: admissions are waiting for it.
        while costs := _next_costs(ledger):
            costed += _book(ledger, costs, costed_at)
    finally:
        ledger.close()
    return costed


def provider_cost(event: Mapping[str, Any]) -> Decimal | None:
    """USD that the provider charges for one event, to 12 decimals; None where no price is known.

    Per request, because tiered model prices cannot be applied to a sum; prices are those of genai-prices at the time
    of the event. Nothing for calls on the customer's own key, and for events without tokens.
    """
    if not event["platform_paid"] or not (event["input_tokens"] or event["output_tokens"]):
        return Decimal(0)
    if event["model"] is None:
        return None
    from genai_prices import Usage, calc_price  # noqa: PLC0415  a third of a second

    try:
        price = calc_price(
            Usage(**{name: event[name] for name in _PRICED if event[name]}),
            event["model"],
            provider_id=event["provider"],
            genai_request_timestamp=event["occurred_at"],
            price_context=None if event["service_tier"] is None else {"service_tier": event["service_tier"]},
        )
    except (LookupError, ValueError):  # a ValueError where usage overlaps so that its parts cannot be told apart
        return None
    return price.total_price.quantize(PLACES)


@cache
def price_version() -> str:
    """Which price data costs are computed with."""
    return f"genai-prices {version('genai-prices')}"


def _next_costs(ledger: Ledger) -> dict[int, Decimal | None]:
    """Seq -> cost of the next events without one."""
    order = _commit_order(ledger)
    with ledger.read() as connection:
        newest = connection.execute(
            sa.select(*order)
            .join_from(events, event_costs, event_costs.c.seq == events.c.seq)
            .order_by(*(column.desc() for column in order))
            .limit(1)
        ).one_or_none()
        rows = sa.select(events).order_by(*order).limit(EVENTS_PER_COMMIT)
        if newest is not None:
            rows = rows.where(sa.tuple_(*order) > sa.tuple_(*newest))
        if ledger.dialect == "postgresql":
            rows = rows.where(_COMMIT_XID < _XMIN)
        costs: dict[int, Decimal | None] = {}
        for row in connection.execute(rows):
            event = row._asdict()
            costs[row.seq] = _reversed_cost(connection, event) if row.requests < 0 else provider_cost(event)
        return costs


_COMMIT_XID: sa.ColumnClause[int] = sa.literal_column("events.commit_xid", sa.BigInteger)
_XMIN: sa.ColumnClause[int] = sa.literal_column("pg_snapshot_xmin(pg_current_snapshot())::text::bigint", sa.BigInteger)
"""Below it no event is committed any more, and every one is in this snapshot and in any later one."""


def _commit_order(ledger: Ledger) -> Sequence[sa.ColumnElement[int]]:
    """What events are costed in the order of, so that the newest one with a cost tells where to go on.

    On Postgres an event may be committed after another one with a higher `seq`.
    """
    return (_COMMIT_XID, events.c.seq) if ledger.dialect == "postgresql" else (events.c.seq,)


def _book(ledger: Ledger, costs: Mapping[int, Decimal | None], costed_at: datetime) -> int:
    """Write costs, but for events that another run has costed meanwhile; how many were written."""
    with ledger.write() as connection:
        booked = set(connection.execute(sa.select(event_costs.c.seq).where(event_costs.c.seq.in_(costs))).scalars())
        rows = [
            {"seq": seq, "cost": cost, "price_version": price_version(), "costed_at": costed_at}
            for seq, cost in costs.items()
            if seq not in booked
        ]
        if rows:
            connection.execute(event_costs.insert(), rows)
        return len(rows)


def _reversed_cost(connection: sa.Connection, reversal: Mapping[str, Any]) -> Decimal | None:
    """Exactly the cost that was booked for what is taken back, whatever prices are now, or that is about to be."""
    original: UUID = reversal["corrects"]
    candidates = (
        sa.select(events, event_costs.c.seq.label("booked"), event_costs.c.cost)
        .outerjoin(event_costs, event_costs.c.seq == events.c.seq)
        .where(sa.or_(events.c.event_id == original, events.c.corrects == original), events.c.requests > 0)
    )
    for row in connection.execute(candidates):
        if derive_event_id("reversal", row.event_id.hex) == reversal["event_id"]:
            cost = provider_cost(row._asdict()) if row.booked is None else row.cost
            return None if cost is None else -cost
    return None
