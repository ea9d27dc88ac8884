"""Corrections: a reversal of exactly what was billed, and a full replacement. Facts themselves never change."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

from metering.admission.counters import CounterBook, units_of
from metering.admission.directory import Directory
from metering.admission.rows import event_row
from metering.admission.statements import statements
from metering.billing.reconciliation import state_of
from metering.errors import CorrectionConflict, UnknownEvent
from metering.events import TOKEN_FIELDS, Call, TokenUsage, derive_event_id
from metering.ledger import outbox
from metering.ledger.transactions import Locked
from metering.ledger.types import decimal_text, instant_text, parse_instant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime

    from metering.billing import reconciliation
    from metering.billing.reconciliation import RunVerdict
    from metering.ledger import Ledger
    from metering.ledger.transactions import Cursor

__all__ = [
    "Correction",
    "apply_verdict",
    "billed_event",
    "correct",
    "correcting_ids",
    "find_event",
    "reversal_row",
    "standing",
]

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
    Raises `CorrectionConflict` where that event was replaced before by other values, undone, or archived;
    `UnknownEvent`.
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
    current = billed_event(cursor, event_id)
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


def apply_verdict(ledger: Ledger, verdict: RunVerdict, *, reconciliation: int, actor: str, now: datetime) -> bool:
    """Book what is proposed for a run, all of it in one transaction; False where just that was booked before.

    Another reconciliation may have proposed the same: ids derive from what was billed then, so it is booked once.
    Raises `CorrectionConflict`, with nothing booked, where anything else is billed or traced of the run since it was
    judged, or where the proposal says too little.
    """
    accounts = () if verdict.account is None else (verdict.account,)
    work = Locked(lambda cursor: _apply(cursor, verdict, reconciliation, actor, now), accounts=accounts)
    return ledger.writer.run(work)


def _apply(cursor: Cursor, verdict: RunVerdict, number: int, actor: str, now: datetime) -> bool:
    what = f"run {verdict.run_id!r} of account {verdict.account!r}"
    if verdict.account is None or not verdict.corrections:
        raise CorrectionConflict(f"{what}: nothing is proposed that could be booked ({verdict.reason})")
    if any(step.action == "add" and step.line is None for step in verdict.corrections):
        raise CorrectionConflict(f"{what}: it is not known which line it is sold on: use Meter.record, with its run_id")
    is_as_judged = _state(cursor, verdict.run_id) == verdict.state
    if not is_as_judged and not _is_booked(cursor, verdict):
        raise CorrectionConflict(f"{what}: it has changed since it was judged; reconcile again")
    if is_as_judged:
        reason = f"reconciliation {number}: {verdict.verdict}"
        for step in verdict.corrections:
            if step.event_id is not None:
                _book(cursor, step.event_id, _wanted(step), reason, now)
            elif step.action == "add":
                row = _added_row(cursor, verdict, step, now) | {"reason": reason}
                cursor.execute(_SQL["insert_event_id"], row)
                cursor.execute(_SQL["insert_event"], row)
    mark = {"reconciliation": number, "number": verdict.number, "applied_at": instant_text(now), "applied_by": actor}
    cursor.execute(_SQL["mark_applied"], mark)
    return is_as_judged


def _state(cursor: Cursor, run_id: str) -> str:
    """Of all accounts that have such a run, so that none is billed for what another one came to be billed for."""
    rows = cursor.execute(_SQL["find_run_events"], {"run_id": run_id}).fetchall()
    # A signal without a model counts a text, and is no call of a model.
    texts = {event_id for event_id, kind, *_, model in rows if kind == "signal" and model is None}
    numbers = [
        seq for event_id, _, corrects, seq, model in rows if model is not None or not texts & {event_id, corrects}
    ]
    spans, last_span = cursor.execute(_SQL["count_run_spans"], {"run_id": run_id}).fetchone()
    return state_of(len(numbers), max(numbers, default=0), spans, last_span)


def _is_booked(cursor: Cursor, verdict: RunVerdict) -> bool:
    """Whether every step was booked before, as it is."""
    steps = [step for step in verdict.corrections if step.action != "accept"]
    for step in steps:
        found = find_event(cursor, _outcome(verdict, step))
        if step.event_id is None:
            wanted: dict[str, Any] = {**step.usage.to_dict(), "line": step.line, "model": step.model}
        else:
            wanted = _wanted(step)
        if found is None or any(found[name] != value for name, value in wanted.items()):
            return False
    return bool(steps)


def standing(events: Iterable[tuple[UUID, int]]) -> set[UUID]:
    """Of events and reversals (whose requests are negative), by id: the events that no reversal took back."""
    ids = dict(events)
    return {event_id for event_id, requests in ids.items() if requests > 0 and correcting_ids(event_id)[0] not in ids}


def _outcome(verdict: RunVerdict, step: reconciliation.Correction) -> UUID:
    """The id of the event that a step books."""
    if step.event_id is not None:
        return correcting_ids(step.event_id)[1]
    return derive_event_id("reconciled", verdict.account or "", verdict.run_id, step.model or "", verdict.state)


def _wanted(step: reconciliation.Correction) -> dict[str, Any]:
    """What is to change of the event of a step."""
    if step.action == "take_back":
        return {**step.usage.to_dict(), "billable": False}
    named = {name: value for name, value in (("model", step.model), ("provider", step.provider)) if value is not None}
    return {**step.usage.to_dict(), **named}


def _added_row(cursor: Cursor, verdict: RunVerdict, step: reconciliation.Correction, now: datetime) -> dict[str, Any]:
    assert verdict.account is not None
    assert step.line is not None
    assert step.occurred_at is not None
    placed = Directory().place(cursor, verdict.account, step.occurred_at)
    return event_row(
        Call(
            line=step.line,
            provider=step.provider,
            model=step.model,
            run_id=verdict.run_id,
            platform_paid=step.platform_paid,
        ),
        event_id=_outcome(verdict, step),
        account=verdict.account,
        key_id=None,
        plan_version=placed.plan_version,
        period=placed.label,
        occurred_at=step.occurred_at,
        recorded_at=now,
        usage=step.usage,
        quantity=None,
        kind="correction",
        caller_type=step.caller_type,
        billable=step.billable,
        late=True,
        source="reconciliation",
    )


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


def billed_event(cursor: Cursor, event_id: UUID) -> dict[str, Any]:
    """As `find_event`, of an event that can be corrected. Raises `UnknownEvent`, `CorrectionConflict` once archived.

    What corrects it would be costed and billed by it, and it is, or is about to be, no longer there.
    """
    (period,) = cursor.execute(_SQL["find_archived"], {"event_id": event_id.hex}).fetchone()
    if period is not None:
        raise CorrectionConflict(
            f"event {event_id} of {period} is archived, so it can no longer be corrected; a credit note can give back "
            "what was billed for it"
        )
    row = find_event(cursor, event_id)
    if row is None:
        raise UnknownEvent(event_id)
    return row


def _move_counters(cursor: Cursor, before: dict[str, Any], after: dict[str, Any]) -> None:
    counters = CounterBook.of(cursor).page(
        before["account"], before["line"], before["key_id"] or "", parse_instant(before["occurred_at"])
    )
    counters.move(_units(after), _units(before))


def _units(row: dict[str, Any]) -> dict[str, int | Decimal]:
    return units_of(TokenUsage(**{name: row[name] for name in TOKEN_FIELDS}), Decimal(row["quantity"]))
