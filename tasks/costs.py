"""What the provider charges for each event: computed once per event, and kept in the ledger."""

from __future__ import annotations

from decimal import Decimal
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from prefect import task

from metering.events import derive_event_id
from metering.ledger import Ledger, plan_versions
from metering.ledger.schema import event_costs, events

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime
    from uuid import UUID

__all__ = [
    "Cost",
    "commit_order",
    "cost_events",
    "knows_price",
    "negated",
    "price_version",
    "pricing",
    "provider_cost",
    "reversed_events",
]

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


Cost = tuple[Decimal | None, str]
"""USD, None where no price is known; and which version of which prices says so."""


@task
def cost_events(ledger_url: str, costed_at: datetime) -> int:
    """Cost every event that has no cost yet, oldest first; how many. Each batch is one transaction."""
    ledger = Ledger(ledger_url)
    costed = 0
    try:
        # Prices are looked up outside the write transaction: admissions are waiting for it.
        while batch := _next_costs(ledger):
            costed += _book(ledger, batch, costed_at)
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


def knows_price(name: str) -> bool:
    """Whether there is a price for PROVIDER:MODEL, as a plan's `unknown_price` names one."""
    from genai_prices import Usage, calc_price  # noqa: PLC0415  a third of a second

    provider, _, model = name.partition(":")
    try:
        calc_price(Usage(), model, provider_id=provider)
    except LookupError:
        return False
    return True


def pricing(connection: sa.Connection) -> Callable[[Mapping[str, Any]], Cost]:
    """What tells the cost of an event that is no reversal: by its own price, else by the one its plan version names."""
    named = {version.plan_version: version.plan.named_price for version in plan_versions.versions(connection)}

    def cost_of(event: Mapping[str, Any]) -> Cost:
        cost, name = provider_cost(event), named.get(event["plan_version"])
        if cost is None and name is not None:
            provider, _, model = name.partition(":")
            cost = provider_cost({**event, "provider": provider, "model": model})
            if cost is not None:
                return cost, f"{price_version()} as {name}"
        return cost, price_version()

    return cost_of


def negated(cost: Cost) -> Cost:
    """What a reversal of it costs."""
    return None if cost[0] is None else -cost[0], cost[1]


def reversed_events(connection: sa.Connection, reversals: Iterable[Mapping[str, Any]]) -> dict[UUID, dict[str, Any]]:
    """The event that each reversal takes back, by the reversal's id, with its `booked` cost; None where it has none."""
    originals = {reversal["corrects"] for reversal in reversals}
    candidates = (
        sa.select(events, event_costs.c.cost, event_costs.c.price_version)
        .outerjoin(event_costs, event_costs.c.seq == events.c.seq)
        .where(sa.or_(events.c.event_id.in_(originals), events.c.corrects.in_(originals)), events.c.requests > 0)
    )
    found = {}
    for row in connection.execute(candidates).mappings() if originals else ():
        booked = None if row["price_version"] is None else (row["cost"], row["price_version"])
        found[derive_event_id("reversal", row["event_id"].hex)] = {**row, "booked": booked}
    return found


def _next_costs(ledger: Ledger) -> list[tuple[dict[str, Any], Cost | None]]:
    """The next events without a cost, each with its cost; None for reversals, whose cost is that of another event."""
    order = commit_order(ledger)
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
        cost_of = pricing(connection)
        found = [row._asdict() for row in connection.execute(rows)]
        return [(event, None if event["requests"] < 0 else cost_of(event)) for event in found]


_COMMIT_XID: sa.ColumnClause[int] = sa.literal_column("events.commit_xid", sa.BigInteger)
_XMIN: sa.ColumnClause[int] = sa.literal_column("pg_snapshot_xmin(pg_current_snapshot())::text::bigint", sa.BigInteger)
"""Below it no event is committed any more, and every one is in this snapshot and in any later one."""


def commit_order(ledger: Ledger) -> Sequence[sa.ColumnElement[int]]:
    """What events are costed in the order of, so that the newest one with a cost tells where to go on.

    On Postgres an event may be committed after another one with a higher `seq`.
    """
    return (_COMMIT_XID, events.c.seq) if ledger.dialect == "postgresql" else (events.c.seq,)


def _book(ledger: Ledger, batch: Sequence[tuple[dict[str, Any], Cost | None]], costed_at: datetime) -> int:
    """Write costs, but for events that another run has costed meanwhile; how many were written.

    Reversals are costed here, because a recost may have changed since what they take back.
    """
    costs = {event["seq"]: cost for event, cost in batch}
    with ledger.write() as connection:
        booked = set(connection.execute(sa.select(event_costs.c.seq).where(event_costs.c.seq.in_(costs))).scalars())
        reversals = [event for event, cost in batch if cost is None and event["seq"] not in booked]
        taken_back = reversed_events(connection, reversals)
        for reversal in reversals:
            costs[reversal["seq"]] = _reversed_cost(connection, taken_back.get(reversal["event_id"]), costs)
        rows = [
            {"seq": seq, "cost": cost[0], "price_version": cost[1], "costed_at": costed_at}
            for seq, cost in costs.items()
            if cost is not None and seq not in booked
        ]
        if rows:
            connection.execute(event_costs.insert(), rows)
        return len(rows)


def _reversed_cost(
    connection: sa.Connection, original: Mapping[str, Any] | None, costs: Mapping[int, Cost | None]
) -> Cost:
    """Exactly what was booked for what is taken back, whatever prices are now, or what is about to be."""
    if original is None:
        return None, price_version()
    return negated(original["booked"] or costs.get(original["seq"]) or pricing(connection)(original))
