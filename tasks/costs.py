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
        while batch := _cost_batch(ledger, costed_at):
            costed += batch
    finally:
        ledger.close()
    return costed


def provider_cost(event: Mapping[str, Any]) -> Decimal | None:
    """USD that the provider charges for one event; None where no price is known.

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
    except LookupError:
        return None
    return price.total_price.quantize(PLACES)


@cache
def price_version() -> str:
    """Which price data costs are computed with."""
    return f"genai-prices {version('genai-prices')}"


def _cost_batch(ledger: Ledger, costed_at: datetime) -> int:
    with ledger.write() as connection:
        newest = connection.execute(sa.select(sa.func.max(event_costs.c.seq))).scalar() or 0
        rows = connection.execute(
            sa.select(events).where(events.c.seq > newest).order_by(events.c.seq).limit(EVENTS_PER_COMMIT)
        )
        costs = [
            {
                "seq": event["seq"],
                "cost": _cost_of_reversed(connection, event) if event["requests"] < 0 else provider_cost(event),
                "price_version": price_version(),
                "costed_at": costed_at,
            }
            for event in map(_by_name, rows)
        ]
        if costs:
            connection.execute(event_costs.insert(), costs)
    return len(costs)


def _by_name(row: sa.Row[Any]) -> dict[str, Any]:
    return row._asdict()


def _cost_of_reversed(connection: sa.Connection, reversal: Mapping[str, Any]) -> Decimal | None:
    """Exactly the cost that was booked for what is taken back, whatever prices are now."""
    original: UUID = reversal["corrects"]
    query = (
        sa.select(events.c.event_id, event_costs.c.cost)
        .join(event_costs, event_costs.c.seq == events.c.seq)
        .where(sa.or_(events.c.event_id == original, events.c.corrects == original), events.c.requests > 0)
    )
    for event_id, cost in connection.execute(query):
        if derive_event_id("reversal", event_id.hex) == reversal["event_id"]:
            return None if cost is None else -cost
    return None if reversal["model"] is None else -(provider_cost(_positive(reversal)) or Decimal(0))


def _positive(reversal: Mapping[str, Any]) -> dict[str, Any]:
    return {**reversal, **{name: -reversal[name] for name in _PRICED}}
