"""Holds as rows of the ledger: kept, given back, and told apart when they are settled."""

from __future__ import annotations

import hashlib
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from metering.admission.counters import NOTHING, CounterBook, Counters, dump_units, load_units
from metering.admission.decide import RateCounter, moved_arrival
from metering.admission.statements import statements
from metering.ledger.types import decimal_text, instant_text, parse_instant

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from uuid import UUID

    from metering.admission.protocol import HoldTicket, Settlement
    from metering.events import Call
    from metering.ledger.transactions import Cursor

__all__ = ["KeptHold", "give_back", "keep_hold", "keep_settled", "move_rates", "settlement_digest"]

_SQL = statements()


class KeptHold(NamedTuple):
    """An open hold as the ledger keeps it."""

    hold_id: str
    account: str
    key_id: str
    line: str
    admitted_at: str
    expires_at: str
    fingerprint: str | None
    reserved: str
    rate_claims: str


def keep_hold(
    cursor: Cursor,
    hold: HoldTicket,
    call: Call,
    reserved: Mapping[str, int | Decimal],
    arrivals: Mapping[RateCounter, int | Decimal],
) -> None:
    """Write a hold, with what it reserved and the arrivals it left its rates at."""
    claims = [
        [rate.metric, rate.line, rate.key_id, rate.units, rate.period_us, decimal_text(arrival)]
        for rate, arrival in arrivals.items()
    ]
    row = {
        **_row_of(hold, call),
        "reserved": dump_units(dict(reserved)),
        "rate_claims": msgspec.json.encode(claims).decode(),
    }
    cursor.execute(_SQL["insert_hold"], row)
    CounterBook.of(cursor).forget_expiries(hold.account)


def keep_settled(cursor: Cursor, hold: HoldTicket, call: Call, digest: str, event_id: UUID, *, is_known: bool) -> None:
    """Note how a hold was settled. One that the ledger does not know is written: the same settle may come again."""
    row = {**_row_of(hold, call), "settlement": digest, "settled_event_id": event_id.hex}
    cursor.execute(_SQL["settle_hold" if is_known else "insert_settled_hold"], row)


def _row_of(hold: HoldTicket, call: Call) -> dict[str, Any]:
    return {
        "hold_id": hold.hold_id.hex,
        "event_id": hold.event_id.hex,
        "account": hold.account,
        "key_id": hold.key_id,
        "line": call.line,
        "run_id": call.run_id,
        "fingerprint": hold.fingerprint,
        "admitted_at": instant_text(hold.admitted_at),
        "expires_at": instant_text(hold.expires_at),
    }


def give_back(cursor: Cursor, hold: KeptHold, state: str, now: datetime) -> None:
    """Close an open hold as `released` or `expired`, and take its units back from the counters."""
    cursor.execute(_SQL["close_hold"], {"hold_id": hold.hold_id, "state": state})
    book = CounterBook.of(cursor)
    book.forget_expiries(hold.account)
    counters = book.page(hold.account, hold.line, hold.key_id, parse_instant(hold.admitted_at))
    reserved = load_units(hold.reserved)
    counters.move(NOTHING, reserved)
    move_rates(counters, hold.rate_claims, {metric: -amount for metric, amount in reserved.items()}, now)


def move_rates(counters: Counters, rate_claims: str, delta: Mapping[str, int | Decimal], now: datetime) -> None:
    """Move the rates a hold claimed by what it turned out to cost more, or less."""
    claims = {RateCounter(*claim): Decimal(arrival) for *claim, arrival in msgspec.json.decode(rate_claims)}
    for rate, arrival in counters.arrivals().items() if claims else ():
        if rate in claims and delta[rate.metric]:
            counters.put_arrival(rate, moved_arrival(rate, arrival, claims[rate], delta[rate.metric], now))


def settlement_digest(settlement: Settlement) -> str:
    """Tells one settle of a hold from another."""
    call = settlement.call
    facts = [
        settlement.usage.to_dict(),
        decimal_text(settlement.quantity),
        settlement.estimated,
        call.provider,
        call.model,
        call.service_tier,
    ]
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=16).hexdigest()
