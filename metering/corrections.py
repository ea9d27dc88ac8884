"""Corrections: a reversal of exactly what was billed, and a full replacement. Facts themselves never change."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from metering.admission.counters import CounterBook, units_of
from metering.admission.statements import statements
from metering.errors import CorrectionConflict, UnknownEvent
from metering.events import TOKEN_FIELDS, TokenUsage, derive_event_id
from metering.ledger import outbox
from metering.ledger.types import decimal_text, instant_text, parse_instant

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from metering.ledger import Ledger
    from metering.ledger.transactions import Cursor

__all__ = ["Correction", "correct", "correcting_ids", "find_event", "reversal_row"]

_SQL = statements()


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """The two events that correct one; None where it already was as asked. `replacement` is what is billed now."""

    original: UUID
    reversal: UUID | None
    replacement: UUID | None


def correct(
    ledger: Ledger,
    event_id: UUID,
    *,
    usage: TokenUsage | None,
    quantity: Decimal | None,
    model: str | None,
    provider: str | None,
    billable: bool | None,
    reason: str,
    now: datetime,
    announce: Callable[[], object] = outbox.no_one,
) -> Correction:
    """Replace the billed event `event_id`; None keeps a value.

    Both new ids derive from the event they replace, so the same correction is booked once, however often it is sent.
    `announce` is called after the commit of one that moves counters; what it raises, the correction stands.
    Raises `CorrectionConflict` where that event was replaced before by other values, or undone; `UnknownEvent`.
    """
    said = {} if usage is None else dict(usage.to_dict())
    given: dict[str, Any] = {"model": model, "provider": provider, "billable": billable, **said}
    if quantity is not None:
        given["quantity"] = decimal_text(quantity)
    wanted = {name: value for name, value in given.items() if value is not None}
    correction, moves_counters = ledger.writer.run(lambda cursor: _book(cursor, event_id, wanted, reason, now))
    if moves_counters:
        outbox.tell(announce)
    return correction


def _book(
    cursor: Cursor, event_id: UUID, wanted: dict[str, Any], reason: str, now: datetime
) -> tuple[Correction, bool]:
    """The correction, and whether it moves counters."""
    current = find_event(cursor, event_id)
    if current is None:
        raise UnknownEvent(event_id)
    if current["requests"] < 0:
        raise CorrectionConflict(f"event {event_id} is a reversal: correct the replacement that came with it")
    original = UUID(current["corrects"] or current["event_id"])
    reversal, replacement = correcting_ids(event_id)
    changed = current | wanted
    booked = find_event(cursor, replacement)
    if booked is not None:
        if any(booked[name] != changed[name] for name in _CORRECTABLE):
            raise CorrectionConflict(f"event {event_id} was corrected before: event {replacement} is billed for it")
        return Correction(original=original, reversal=reversal, replacement=replacement), bool(current["counted"])
    if find_event(cursor, reversal) is not None:
        raise CorrectionConflict(f"event {event_id} was undone: nothing is billed for it")
    if changed == current:
        return Correction(original=original, reversal=None, replacement=None), False
    replaced = changed | _shared(current, reason, now) | {"event_id": replacement.hex}
    for row in (reversal_row(current, reason=reason, now=now), replaced):
        cursor.execute(_SQL["insert_event_id"], row)
        cursor.execute(_SQL["insert_event"], row)
    if current["counted"]:
        _move_counters(cursor, current, changed)
        outbox.note(cursor, current["account"], recount=True, now=now)
    return Correction(original=original, reversal=reversal, replacement=replacement), bool(current["counted"])


_CORRECTABLE = (*TOKEN_FIELDS, "quantity", "model", "provider", "billable")


def correcting_ids(event_id: UUID) -> tuple[UUID, UUID]:
    """The ids of the reversal and the replacement of an event, should there be any."""
    return derive_event_id("reversal", event_id.hex), derive_event_id("replacement", event_id.hex)


def reversal_row(row: dict[str, Any], *, reason: str, now: datetime) -> dict[str, Any]:
    """The row that takes exactly what `row` (of `events`) has."""
    reversal, _ = correcting_ids(UUID(row["event_id"]))
    negated = {name: -row[name] for name in ("requests", *TOKEN_FIELDS)}
    negated["quantity"] = decimal_text(-Decimal(row["quantity"]))
    return row | negated | _shared(row, reason, now) | {"event_id": reversal.hex}


def _shared(row: dict[str, Any], reason: str, now: datetime) -> dict[str, Any]:
    return {
        "kind": "correction",
        "corrects": row["corrects"] or row["event_id"],
        "recorded_at": instant_text(now),
        "idempotency_key": None,
        "fingerprint": None,
        "reason": reason,
    }


def find_event(cursor: Cursor, event_id: UUID) -> dict[str, Any] | None:
    """A row of `events` without its number."""
    row = cursor.execute(_SQL["find_event"], {"event_id": event_id.hex}).fetchone()
    if row is None:
        return None
    values = dict(zip((column[0] for column in cursor.description), row, strict=True))
    del values["seq"]
    return values


def _move_counters(cursor: Cursor, before: dict[str, Any], after: dict[str, Any]) -> None:
    counters = CounterBook.of(cursor).page(
        before["account"], before["line"], before["key_id"] or "", parse_instant(before["occurred_at"])
    )
    counters.move(_units(after), _units(before))


def _units(row: dict[str, Any]) -> dict[str, int | Decimal]:
    return units_of(TokenUsage(**{name: row[name] for name in TOKEN_FIELDS}), Decimal(row["quantity"]))
