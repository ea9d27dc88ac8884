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
    """The two events that correct one, or none where the fact already was as asked."""

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
    """Replace what is billed for a fact; None keeps a value. Raises `UnknownEvent`, `CorrectionConflict`."""

    def work(shared_cursor: sqlite3.Cursor) -> Correction:
        cursor = shared_cursor.connection.cursor()
        cursor.row_factory = sqlite3.Row
        original, current = _current(cursor, event_id)
        changed = dict(current)
        if usage is not None:
            changed.update(usage.to_dict())
        if quantity is not None:
            changed["quantity"] = decimal_text(quantity)
        said = {"model": model, "provider": provider, "billable": billable}
        changed.update({name: value for name, value in said.items() if value is not None})
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
        reversal = derive_event_id("reversal", current["event_id"])
        replacement = derive_event_id("replacement", current["event_id"])
        negated = {name: -current[name] for name in ("requests", *TOKEN_FIELDS)}
        negated["quantity"] = decimal_text(-Decimal(current["quantity"]))
        _insert(cursor, current | negated | shared | {"event_id": reversal.hex})
        _insert(cursor, changed | shared | {"event_id": replacement.hex})
        if current["counted"]:
            _move_counters(shared_cursor, current, changed)
        return Correction(original=original, reversal=reversal, replacement=replacement)

    return ledger.writer.run(work)


def _current(cursor: sqlite3.Cursor, event_id: UUID) -> tuple[UUID, dict[str, Any]]:
    """The fact an id belongs to, and the event that is billed for it now."""
    row = cursor.execute(_SQL["find_event"], {"event_id": event_id.hex}).fetchone()
    if row is None:
        raise UnknownEvent(event_id)
    original = UUID(row["corrects"] or row["event_id"])
    newest = cursor.execute(_SQL["find_newest_replacement"], {"original": original.hex}).fetchone()
    if newest is None:
        newest = cursor.execute(_SQL["find_event"], {"event_id": original.hex}).fetchone()
        if newest is None:
            raise UnknownEvent(original)
    values = dict(newest)
    del values["seq"]
    return original, values


def _insert(cursor: sqlite3.Cursor, row: dict[str, Any]) -> None:
    cursor.execute(_SQL["insert_event_id"], row)
    if cursor.rowcount != 1:
        raise CorrectionConflict(f"event {row['corrects']} was corrected meanwhile; read it again")
    cursor.execute(_SQL["insert_event"], row)


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
