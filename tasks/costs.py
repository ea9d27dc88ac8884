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
    from collections.abc import Mapping
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
    with ledger.read() as connection:
        newest = connection.execute(sa.select(sa.func.max(event_costs.c.seq))).scalar() or 0
        rows = connection.execute(
            sa.select(events).where(events.c.seq > newest).order_by(events.c.seq).limit(EVENTS_PER_COMMIT)
        )
        costs: dict[int, Decimal | None] = {}
        for row in rows:
            event = row._asdict()
            costs[row.seq] = _reversed_cost(connection, event, costs) if row.requests < 0 else provider_cost(event)
        return costs


def _book(ledger: Ledger, costs: Mapping[int, Decimal | None], costed_at: datetime) -> int:
    """Write costs, but for events that another run has costed meanwhile; how many were written."""
    with ledger.write() as connection:
        newest = connection.execute(sa.select(sa.func.max(event_costs.c.seq))).scalar() or 0
        rows = [
            {"seq": seq, "cost": cost, "price_version": price_version(), "costed_at": costed_at}
            for seq, cost in costs.items()
            if seq > newest
        ]
        if rows:
            connection.execute(event_costs.insert(), rows)
        return len(rows)


def _reversed_cost(
    connection: sa.Connection, reversal: Mapping[str, Any], costs: Mapping[int, Decimal | None]
) -> Decimal | None:
    """Exactly the cost that was booked for what is taken back, whatever prices are now. `costs` are not booked yet."""
    original: UUID = reversal["corrects"]
    candidates = (
        sa.select(events.c.seq, events.c.event_id, event_costs.c.cost)
        .outerjoin(event_costs, event_costs.c.seq == events.c.seq)
        .where(sa.or_(events.c.event_id == original, events.c.corrects == original), events.c.requests > 0)
    )
    for seq, event_id, booked in connection.execute(candidates):
        if derive_event_id("reversal", event_id.hex) == reversal["event_id"]:
            cost: Decimal | None = costs.get(seq, booked)
            return None if cost is None else -cost
    return None
