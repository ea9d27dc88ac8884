"""Corrections: a reversal of exactly what was billed, and a full replacement. Facts themselves never change."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from metering.admission.counters import Counters, units_of
from metering.admission.statements import statements
from metering.errors import CorrectionConflict, UnknownEvent
from metering.events import TOKEN_FIELDS, TokenUsage, derive_event_id
from metering.ledger.types import decimal_text, instant_text, parse_instant

if TYPE_CHECKING:
    from datetime import datetime

    from metering.ledger import Ledger

__all__ = ["Correction", "correct"]

_SQL = statements("sqlite")


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
) -> Correction:
    """Replace the billed event `event_id`; None keeps a value.

    Both new ids derive from the event they replace, so the same correction is booked once, however often it is sent.
    Raises `CorrectionConflict` where that event was replaced before by other values, `UnknownEvent`.
    """
    said = {} if usage is None else dict(usage.to_dict())
    given: dict[str, Any] = {"model": model, "provider": provider, "billable": billable, **said}
    if quantity is not None:
        given["quantity"] = decimal_text(quantity)
    wanted = {name: value for name, value in given.items() if value is not None}

    def work(shared_cursor: sqlite3.Cursor) -> Correction:
        cursor = shared_cursor.connection.cursor()
        cursor.row_factory = sqlite3.Row
        current = _find(cursor, event_id)
        if current is None:
            raise UnknownEvent(event_id)
        if current["requests"] < 0:
            raise CorrectionConflict(f"event {event_id} is a reversal: correct the replacement that came with it")
        original = UUID(current["corrects"] or current["event_id"])
        reversal = derive_event_id("reversal", event_id.hex)
        replacement = derive_event_id("replacement", event_id.hex)
        changed = current | wanted
        booked = _find(cursor, replacement)
        if booked is not None:
            if any(booked[name] != changed[name] for name in _CORRECTABLE):
                raise CorrectionConflict(f"event {event_id} was corrected before: event {replacement} is billed for it")
            return Correction(original=original, reversal=reversal, replacement=replacement)
        if changed == current:
            return Correction(original=original, reversal=None, replacement=None)
        shared = {
            "kind": "correction",
            "corrects": original.hex,
            "recorded_at": instant_text(now),
            "idempotency_key": None,
            "fingerprint": None,
            "reason": reason,
        }
        negated = {name: -current[name] for name in ("requests", *TOKEN_FIELDS)}
        negated["quantity"] = decimal_text(-Decimal(current["quantity"]))
        for row in (
            current | negated | shared | {"event_id": reversal.hex},
            changed | shared | {"event_id": replacement.hex},
        ):
            cursor.execute(_SQL["insert_event_id"], row)
            cursor.execute(_SQL["insert_event"], row)
        if current["counted"]:
            _move_counters(shared_cursor, current, changed)
        return Correction(original=original, reversal=reversal, replacement=replacement)

    return ledger.writer.run(work)


_CORRECTABLE = (*TOKEN_FIELDS, "quantity", "model", "provider", "billable")


def _find(cursor: sqlite3.Cursor, event_id: UUID) -> dict[str, Any] | None:
    row = cursor.execute(_SQL["find_event"], {"event_id": event_id.hex}).fetchone()
    if row is None:
        return None
    values = dict(row)
    del values["seq"]
    return values


def _move_counters(cursor: sqlite3.Cursor, before: dict[str, Any], after: dict[str, Any]) -> None:
    counters = Counters(
        cursor,
        account=before["account"],
        line=before["line"],
        key_id=before["key_id"] or "",
        at=parse_instant(before["occurred_at"]),
    )
    counters.move(_units(after), _units(before))


def _units(row: dict[str, Any]) -> dict[str, int | Decimal]:
    return units_of(TokenUsage(**{name: row[name] for name in TOKEN_FIELDS}), Decimal(row["quantity"]))
