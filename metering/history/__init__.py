"""The whole life of a call, from its admission to the invoice: what is known under one key. Nothing is changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import UUID

from metering.errors import NotFound
from metering.history.bills import Bill, bills_of
from metering.history.ledger import (
    DeadLetter,
    EventRow,
    Held,
    KeyReuse,
    KeyShown,
    LogRow,
    Place,
    find_places,
    read_place,
)
from metering.ledger.archived import archived_periods

if TYPE_CHECKING:
    from pathlib import Path

    import sqlalchemy as sa

    from metering.admission.redis.link import Link
    from metering.history.redis import OnRedis
    from metering.ledger import Ledger

__all__ = ["History", "histories_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What became of the calls under one idempotency key of an account and line, or of one call without a key."""

    account: str
    line: str
    idempotency_key: str | None
    keys: tuple[KeyShown, ...]
    """The API keys that were used."""
    events: tuple[EventRow, ...]
    """In the order in which the ledger took them."""
    holds: tuple[Held, ...]
    """Of the ledger, then of Redis."""
    log: tuple[LogRow, ...]
    reuses: tuple[KeyReuse, ...]
    dead_letters: tuple[DeadLetter, ...]
    undrained: tuple[OnRedis, ...]
    """What stands in Redis and the ledger has not."""
    bills: tuple[Bill, ...]
    """One for each billing period that its events are in."""


def histories_of(
    ledger: Ledger,
    key: str,
    *,
    account: str | None = None,
    line: str | None = None,
    out: Path,
    link: Link | None = None,
) -> list[History]:
    """Everything under an idempotency key, or about an event by its id. One history for each account and line.

    `out` is where drafts of invoices are looked for, `link` a Redis that decides quotas. Without `account` and `line`
    all of the ledger is searched, which takes seconds for a million events. An open hold that only Redis has is found
    with both.

    Raises `NotFound` where nothing is known of it, `StoreUnavailable`.
    """
    event_id = _event_id(key)
    # Redis first: what is drained meanwhile is then found twice, and not missed.
    coming: list[OnRedis] = []
    if link is not None:
        from metering.history import redis  # noqa: PLC0415  an app without Redis need not have its client

        coming = redis.in_streams(link, key, event_id, account=account, line=line)
    with ledger.read() as connection:
        places = find_places(connection, key, event_id, account=account, line=line)
    for entry in coming:
        named = (entry.account, entry.line, entry.idempotency_key)
        place = places.setdefault(named, Place(account=named[0], line=named[1], idempotency_key=named[2]))
        place.roots.add(entry.event_id)
    held: dict[Any, tuple[Held, ...]] = dict.fromkeys(places, ())
    if link is not None:
        held = {named: redis.holds_of(link, place.account, place.roots) for named, place in places.items()}
    with ledger.read() as connection:
        histories = [_history(connection, place, held[named], coming, out) for named, place in places.items()]
    histories = [history for history in histories if _says_something(history)]
    if not histories:
        asked = {root for place in places.values() for root in place.roots}
        with ledger.read() as connection:
            periods = archived_periods(connection, asked if event_id is None else asked | {event_id})
        if periods:
            raise NotFound(
                f"{key!r} was billed in {', '.join(periods)}, and its events are archived: "
                f"`python -m flows restore {periods[0]}` reads them back"
            )
        where = "the ledger" if link is None else "the ledger and Redis"
        hint = "" if link is None or (account and line) else "; an open hold there is found with its account and line"
        raise NotFound(f"nothing is known of {key!r} in {where}, as an idempotency key or as an event id{hint}")
    return sorted(histories, key=lambda history: (history.account, history.line))


def _history(
    connection: sa.Connection, place: Place, held: tuple[Held, ...], coming: list[OnRedis], out: Path
) -> History:
    known = read_place(connection, place, held)
    return History(
        account=place.account,
        line=place.line,
        idempotency_key=place.idempotency_key,
        keys=known.keys,
        events=known.events,
        holds=known.holds + held,
        log=known.log,
        reuses=known.reuses,
        dead_letters=known.dead_letters,
        undrained=tuple(entry for entry in coming if place.has(entry) and not known.took(entry.position)),
        bills=bills_of(connection, place.account, known.events, out),
    )


def _event_id(key: str) -> UUID | None:
    try:
        return UUID(key)
    except ValueError:
        return None


def _says_something(history: History) -> bool:
    return any((history.events, history.holds, history.reuses, history.dead_letters, history.undrained))
