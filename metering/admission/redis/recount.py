"""Counters counted anew: what the ledger has, what the drain will add to it, and the open holds.

They are read one after the other, and the count is only kept where none of these holds ended meanwhile. Events that
are drained meanwhile are both in the stream and in the ledger: `booking.foreseen` tells them apart.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from metering.admission.counters import counted
from metering.admission.redis.copies import scaled, to_us
from metering.admission.redis.stream import BODY, decode_event
from metering.booking import foreseen
from metering.events import TOKEN_FIELDS, metric_amounts
from metering.ledger.transactions import cursor_of
from metering.ledger.types import parse_instant

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from metering.admission.decide import Counter
    from metering.booking import Found
    from metering.ledger import Ledger
    from metering.ledger.transactions import Cursor

__all__ = ["Count", "OpenHold", "open_holds", "recounted", "undrained_of"]


class OpenHold(NamedTuple):
    """A hold as Redis keeps it."""

    hold_id: str
    line: str
    key_id: str
    admitted_us: int
    reserved: dict[str, str]
    """Scaled amounts by metric."""


class Count(NamedTuple):
    """A counter's total, scaled, and the open holds that are in it with their shares."""

    total: str
    shares: list[tuple[str, str]]


def open_holds(found: Iterable[tuple[bytes, bytes]]) -> list[OpenHold]:
    """What the script `look` answers."""
    holds = []
    for hold_id, packed in found:
        kept = msgspec.msgpack.decode(packed)
        holds.append(OpenHold(hold_id.decode(), kept["line"], kept["key"], kept["admitted"], kept["reserved"] or {}))
    return holds


def undrained_of(entries: Iterable[Found], account: str) -> list[Found]:
    """Those of a stream's entries that are an account's; what cannot be read will not be billed."""
    return [entry for entry in entries if entry is not None and entry[1] and _account_of(entry[1]) == account]


def recounted(
    ledger: Ledger,
    shard: int,
    account: str,
    counters: Iterable[Counter],
    undrained: list[Found],
    holds: list[OpenHold],
    now: datetime,
) -> list[Count]:
    """Each counter as it is to be kept."""
    with ledger.read() as connection:
        cursor = cursor_of(connection)
        coming = foreseen(cursor, shard, undrained, now)
        return [_count(cursor, account, counter, coming, holds) for counter in counters]


def _count(
    cursor: Cursor, account: str, counter: Counter, coming: list[dict[str, Any]], holds: list[OpenHold]
) -> Count:
    def counts(at_us: int, line: str, key_id: str | None) -> bool:
        return (
            to_us(counter.window.start) <= at_us < to_us(counter.window.end)
            and counter.line in ("*", line)
            and counter.key_id in ("", key_id)
        )

    total = int(scaled(counter.metric, counted(cursor, account, counter)))
    for row in coming:
        if row["counted"] and counts(to_us(parse_instant(row["occurred_at"])), row["line"], row["key_id"]):
            tokens = {name: row[name] for name in TOKEN_FIELDS}
            amounts = metric_amounts(tokens, requests=row["requests"], quantity=Decimal(row["quantity"]))
            total += int(scaled(counter.metric, amounts[counter.metric]))
    shares = [
        (hold.hold_id, hold.reserved.get(counter.metric, "0"))
        for hold in holds
        if counts(hold.admitted_us, hold.line, hold.key_id)
    ]
    return Count(str(total + sum(int(share) for _, share in shares)), shares)


def _account_of(fields: list[bytes]) -> str | None:
    try:
        return decode_event(dict(zip(fields[::2], fields[1::2], strict=True))[BODY]).account
    except (msgspec.MsgspecError, KeyError, ValueError):
        return None
