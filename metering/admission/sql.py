"""The SQL store: admissions decided in one transaction on the ledger itself."""

from __future__ import annotations

from datetime import datetime, timedelta
from decimal import localcontext
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from metering.admission.counters import NOTHING, CounterBook, units_of
from metering.admission.decide import (
    asked_of,
    refusing,
    weigh,
)
from metering.admission.directory import CurrentDirectory, Directory
from metering.admission.holding import KeptHold, give_back, keep_hold, keep_settled, move_rates, settlement_digest
from metering.admission.last_known import KnownTerms
from metering.admission.protocol import Appended, Decision, HoldTicket, LimitStatus, Settled
from metering.admission.rows import event_row, log_row
from metering.admission.statements import by_position, statements
from metering.billing.money import EXACT
from metering.clock import utc_now
from metering.errors import IdempotencyConflict, IdempotencyInProgress, InvalidEvent, SettleConflict
from metering.events import derive_event_id, new_event_id
from metering.ledger.transactions import Locked, cursor_of
from metering.ledger.types import instant_text, parse_instant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from metering.admission.directory import Placement
    from metering.admission.last_known import LastKnown
    from metering.admission.protocol import Admission, Bodies, Settlement
    from metering.events import Call, UsageEvent
    from metering.ledger import Ledger
    from metering.ledger.transactions import Cursor
    from metering.ledger.writer import Work

__all__ = ["SqlStore", "SqlWorks"]

_SQL = statements()
_INSERT_EVENT, _values_of = by_position(_SQL["insert_event"])

MAX_BATCH = 10_000
EXPIRED_PER_ADMISSION = 16
EXPIRED_PER_SWEEP = 1_000
REPLAY_KEPT = timedelta(hours=24)


class SqlStore:
    """Decides on the ledger. Keeps `AdmissionStore`'s promises; `clock` is the store's own time."""

    def __init__(
        self, ledger: Ledger, last_known: LastKnown | None = None, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._ledger = ledger
        self._clock = clock
        self._directory = Directory()
        self._works = SqlWorks(self._directory, clock, last_known)

    def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `AdmissionStore.admit`."""
        return self._ledger.writer.run(self._works.admit(admission, now))

    def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `AdmissionStore.settle`."""
        return self._ledger.writer.run(self._works.settle(settlement, now))

    def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """See `AdmissionStore.release`."""
        return self._ledger.writer.run(self._works.release(hold, call, bodies, now))

    def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """See `AdmissionStore.renew`."""
        return self._ledger.writer.run(self._works.renew(hold, ttl_s, now))

    def expire(self, now: datetime | None = None) -> int:
        """See `AdmissionStore.expire`. Works in batches, so that admissions get their turn in between."""
        total = 0
        for account in self.accounts_to_sweep(now):
            while expired := self._ledger.writer.run(self._works.expire_batch(account, now)):
                total += expired
        return total

    def place_of(self, account: str) -> None:
        """All accounts are in one place."""

    def cancel(self, undo: dict[str, Any]) -> None:
        """Nothing is ever in doubt here: a commit whose answer is lost is asked after."""

    def accounts_to_sweep(self, now: datetime | None = None) -> list[str]:
        """Whose holds are past their time."""
        with self._ledger.read() as connection:
            found = cursor_of(connection).execute(
                _SQL["find_accounts_to_sweep"], {"now": instant_text(now or self._clock())}
            )
            return [account for (account,) in found.fetchall()]

    def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """See `AdmissionStore.append`."""
        return self._ledger.writer.run(self._works.append(events, now))

    def quota(self, account: str, key_id: str | None = None, now: datetime | None = None) -> tuple[LimitStatus, ...]:
        """See `AdmissionStore.quota`."""
        at = now or self._clock()
        with self._ledger.read() as connection, localcontext(EXACT):
            placed = self._directory.place(cursor_of(connection), account, at)
            counters = CounterBook.of(cursor_of(connection)).page(account, None, key_id or "", at)
            verdict = weigh(
                ((limit, 0) for limit in placed.plan.limits if limit.scope == "account" or key_id is not None),
                key_id=key_id or "",
                period=placed.period,
                now=at,
                used=counters.used,
                arrival=counters.arrival,
            )
            return tuple(verdict.statuses)


class SqlWorks:
    """Each verb as a work for the ledger's writer, which runs it in a transaction: now, or with others."""

    def __init__(
        self, directory: Directory, clock: Callable[[], datetime], last_known: LastKnown | None = None
    ) -> None:
        self._directory = directory
        self._last_known = last_known
        self._current = CurrentDirectory()
        self._clock = clock

    def admit(self, admission: Admission, now: datetime | None) -> Work[Decision]:
        """Decides one call."""
        return Locked(
            lambda cursor: self._admit(cursor, admission, now or self._clock()), key_digest=admission.key_digest
        )

    def settle(self, settlement: Settlement, now: datetime | None) -> Work[Settled]:
        """Bills a hold's real cost."""
        return Locked(
            lambda cursor: self._settle(cursor, settlement, now or self._clock()), accounts=(settlement.hold.account,)
        )

    def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None) -> Work[bool]:
        """Gives a hold back."""
        return Locked(
            lambda cursor: self._release(cursor, hold, call, bodies, now or self._clock()), accounts=(hold.account,)
        )

    def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None) -> Work[bool]:
        """Prolongs a hold."""
        return Locked(lambda cursor: self._renew(cursor, hold, ttl_s, now or self._clock()), accounts=(hold.account,))

    def expire_batch(self, account: str, now: datetime | None) -> Work[int]:
        """Gives back up to EXPIRED_PER_SWEEP holds of an account that are past their time; how many."""
        return Locked(
            lambda cursor: self._expire_some(cursor, account, now or self._clock(), EXPIRED_PER_SWEEP),
            accounts=(account,),
        )

    def append(self, events: Sequence[UsageEvent], now: datetime | None) -> Work[Appended]:
        """Records facts that ask no limits. Raises `InvalidEvent` for too many at once."""
        if len(events) > MAX_BATCH:
            raise InvalidEvent("events", len(events), f"at most {MAX_BATCH} in one batch")
        return Locked(lambda cursor: self._append(cursor, events, now or self._clock()))

    def _admit(self, cursor: Cursor, admission: Admission, now: datetime) -> Decision:
        account, key_id = self._current.authenticate(cursor, admission.key_digest, now)
        self._expire_some(cursor, account, now, EXPIRED_PER_ADMISSION)
        placed = self._current.place(cursor, account, now)
        self._remember(admission.key_digest, account, key_id, placed)
        call = admission.call
        keyed = call.idempotency_key is not None
        event_id = admission.event_id
        if call.idempotency_key is not None:
            event_id = derive_event_id("usage", account, call.line, call.idempotency_key)
        decided = partial(
            Decision,
            event_id=event_id,
            account=account,
            plan=placed.plan.name,
            plan_version=placed.plan_version,
            key_id=key_id,
        )
        # An id that was minted for this call is known only where the call was sent twice: looked up last, and seldom.
        is_minted = not keyed and admission.hold_ttl_s is None
        replay = None if is_minted else self._replay(cursor, admission, event_id, decided, now)
        if replay is not None:
            return replay

        counters = CounterBook.of(cursor).page(account, call.line, key_id, now)
        units = units_of(admission.usage, admission.quantity)
        if admission.hold_ttl_s is None:
            self._current.require_names(cursor, placed.plan_version, call, units)
        asked = asked_of(
            placed.plan.limits,
            call.line,
            units,
            usage_given=admission.usage is not None,
            quantity_given=admission.quantity is not None,
            is_estimate=admission.hold_ttl_s is not None,
        )
        verdict = counters.weigh(asked, placed, key_id, now)
        if is_minted and (verdict.refused or not _claim_id(cursor, event_id, placed.label, admission.fingerprint)):
            replay = self._replay(cursor, admission, event_id, decided, now)
            if replay is not None:
                return replay
        if verdict.refused:
            return decided(allowed=False, limits=verdict.statuses, refused_by=refusing(verdict.refused))

        hold = None
        if admission.hold_ttl_s is not None:
            hold = HoldTicket(
                hold_id=new_event_id(),
                event_id=event_id,
                account=account,
                key_id=key_id,
                plan_version=placed.plan_version,
                period=placed.label,
                admitted_at=now,
                expires_at=now + timedelta(seconds=admission.hold_ttl_s),
                usage=admission.usage,
                quantity=admission.quantity,
                fingerprint=admission.fingerprint,
            )
            keep_hold(cursor, hold, call, units, verdict.arrivals)
        else:
            if not is_minted:
                _claim_id(cursor, event_id, placed.label, admission.fingerprint)
            row = event_row(
                call,
                event_id=event_id,
                account=account,
                key_id=key_id,
                plan_version=placed.plan_version,
                period=placed.label,
                occurred_at=now,
                recorded_at=now,
                usage=admission.usage,
                quantity=admission.quantity,
                counted=True,
                fingerprint=admission.fingerprint,
            )
            cursor.execute(_INSERT_EVENT, _values_of(row))
            _keep_bodies(cursor, self._current, row, call, admission.bodies, now, replayable=keyed)
        counters.move(units)
        for rate, arrival in verdict.arrivals.items():
            counters.put_arrival(rate, arrival)
        return decided(allowed=True, limits=verdict.statuses, hold=hold)

    def _remember(self, digest: str, account: str, key_id: str, placed: Placement) -> None:
        # Few plans fail open, and every call comes here.
        if self._last_known is not None and (placed.plan.fail == "open" or self._last_known.knows_any):
            terms = KnownTerms(account, key_id, placed.plan, placed.plan_version, placed.period, placed.label)
            self._last_known.note(digest, terms)

    def _replay(
        self,
        cursor: Cursor,
        admission: Admission,
        event_id: UUID,
        decided: Callable[..., Decision],
        now: datetime,
    ) -> Decision | None:
        call = admission.call
        known = cursor.execute(_SQL["find_event_id"], {"event_id": event_id.hex}).fetchone()
        if known is not None:
            fingerprint, response, stored_at = known
            if fingerprint != admission.fingerprint:
                raise IdempotencyConflict(call.line, call.idempotency_key)
            kept = response is not None and parse_instant(stored_at) + REPLAY_KEPT > now
            return decided(
                allowed=True,
                replayed=True,
                response=msgspec.json.decode(response) if kept else None,
                response_expired=not kept,
            )
        row = cursor.execute(_SQL["find_hold_in_flight"], {"event_id": event_id.hex}).fetchone()
        if row is None:
            return None
        hold = KeptHold(*row)
        if parse_instant(hold.expires_at) <= now:
            give_back(cursor, hold, "expired", now)
            return None
        if hold.fingerprint != admission.fingerprint:
            raise IdempotencyConflict(call.line, call.idempotency_key)
        raise IdempotencyInProgress(
            call.line, call.idempotency_key, (parse_instant(hold.expires_at) - now).total_seconds()
        )

    def _settle(self, cursor: Cursor, settlement: Settlement, now: datetime) -> Settled:
        hold, call = settlement.hold, settlement.call
        digest = settlement_digest(settlement)
        found = cursor.execute(_SQL["find_hold"], {"hold_id": hold.hold_id.hex}).fetchone()
        state, settled_as, settled_event_id, rate_claims = found or ("forgotten", None, None, "[]")
        if state == "settled":
            if settled_as != digest:
                raise SettleConflict(
                    f"hold {hold.hold_id} was settled before with other usage; the first settle stands"
                )
            found = cursor.execute(_SQL["find_settled_event"], {"event_id": settled_event_id}).fetchone()
            billable, late = found or (settled_event_id == hold.event_id.hex, False)  # its event may be archived
            return Settled(event_id=UUID(settled_event_id), billable=bool(billable), late=bool(late), repeated=True)

        given = units_of(settlement.usage, settlement.quantity)
        if not settlement.estimated:
            self._directory.require_names(cursor, hold.plan_version, call, given)
        late = state != "open"
        event_id, billable = hold.event_id, True
        if not _claim_id(cursor, event_id, hold.period, hold.fingerprint):
            event_id, billable = derive_event_id("attempt", hold.hold_id.hex), False
            if not _claim_id(cursor, event_id, hold.period, hold.fingerprint):
                return Settled(event_id=event_id, billable=False, late=late, repeated=True)
        taken = NOTHING if late else units_of(hold.usage, hold.quantity)
        counters = CounterBook.of(cursor).page(hold.account, call.line, hold.key_id, hold.admitted_at)
        counters.move(given, taken)
        move_rates(counters, rate_claims, {metric: given[metric] - taken[metric] for metric in given}, now)
        row = event_row(
            call,
            event_id=event_id,
            account=hold.account,
            key_id=hold.key_id,
            plan_version=hold.plan_version,
            period=hold.period,
            occurred_at=hold.admitted_at,
            recorded_at=now,
            usage=settlement.usage,
            quantity=settlement.quantity,
            counted=True,
            billable=billable,
            estimated=settlement.estimated,
            late=late,
            fingerprint=hold.fingerprint,
        )
        cursor.execute(_INSERT_EVENT, _values_of(row))
        replayable = billable and call.idempotency_key is not None
        bodies = settlement.bodies
        _keep_bodies(cursor, self._directory, row, call, bodies, now, replayable=replayable, hold_id=hold.hold_id)
        keep_settled(cursor, hold, call, digest, event_id, is_known=found is not None)
        return Settled(event_id=event_id, billable=billable, late=late)

    def _release(self, cursor: Cursor, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime) -> bool:
        found = cursor.execute(_SQL["find_hold"], {"hold_id": hold.hold_id.hex}).fetchone()
        state = "forgotten" if found is None else found[0]
        if state in ("settled", "released"):
            return False
        is_open = state == "open"
        if is_open:
            row = cursor.execute(_SQL["find_hold_in_flight"], {"event_id": hold.event_id.hex}).fetchone()
            give_back(cursor, KeptHold(*row), "released", now)
        row = {"event_id": None, "account": hold.account, "key_id": hold.key_id, "line": call.line}
        _keep_bodies(cursor, self._directory, row, call, bodies, now, replayable=False, hold_id=hold.hold_id)
        return is_open

    def _expire_some(self, cursor: Cursor, account: str, now: datetime, most: int) -> int:
        first = CounterBook.of(cursor).first_expiry(account)
        if first is None or first > instant_text(now):
            return 0
        scope = {"account": account, "now": instant_text(now), "most": most}
        found = cursor.execute(_SQL["find_expired_holds_of_account"], scope).fetchall()
        for row in found:
            give_back(cursor, KeptHold(*row), "expired", now)
        return len(found)

    def _renew(self, cursor: Cursor, hold: HoldTicket, ttl_s: float, now: datetime) -> bool:
        expires_at = instant_text(now + timedelta(seconds=ttl_s))
        cursor.execute(_SQL["renew_hold"], {"hold_id": hold.hold_id.hex, "expires_at": expires_at})
        return cursor.rowcount == 1

    def _append(self, cursor: Cursor, events: Sequence[UsageEvent], now: datetime) -> Appended:
        known = _fingerprints(cursor, (event.event_id.hex for event in events))
        new: dict[str, dict[str, Any]] = {}
        for event in events:
            event_id = event.event_id.hex
            if event_id in known or event_id in new:
                continue
            placed = self._directory.place(cursor, event.account, event.occurred_at)
            new[event_id] = event_row(
                event,
                event_id=event.event_id,
                kind=event.kind,
                corrects=event.corrects,
                account=event.account,
                key_id=event.key_id,
                plan_version=placed.plan_version,
                period=placed.label,
                caller_type=event.caller_type,
                occurred_at=event.occurred_at,
                recorded_at=now,
                requests=event.requests,
                usage=event.usage,
                quantity=event.quantity,
                billable=event.billable,
                estimated=event.estimated,
                counted=event.counted,
                late=event.late,
                fingerprint=event.fingerprint,
                source=event.source,
            )
        claimed = _claim_ids(cursor, new)
        # Between the look and the claim another process may have brought some of them.
        known |= _fingerprints(cursor, new.keys() - claimed)
        cursor.executemany(_INSERT_EVENT, [_values_of(row) for event_id, row in new.items() if event_id in claimed])
        kept = known | {event_id: row["fingerprint"] for event_id, row in new.items() if event_id in claimed}
        conflicting = tuple(
            position for position, event in enumerate(events) if kept[event.event_id.hex] != event.fingerprint
        )
        return Appended(
            inserted=len(claimed), known=len(events) - len(claimed) - len(conflicting), conflicting=conflicting
        )


def _fingerprints(cursor: Cursor, event_ids: Iterable[str]) -> dict[str, str | None]:
    """Of those that the ledger has, by id."""
    ids = list(event_ids)
    if not ids:
        return {}
    wanted = {"event_ids": msgspec.json.encode(ids).decode()}
    return dict(cursor.execute(_SQL["find_known_ids"], wanted).fetchall())


def _claim_ids(cursor: Cursor, rows: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Which of these facts are the first of their ids. In one order, so that two processes do not block each other."""
    if not rows:
        return set()
    names = sorted((event_id, row["period"], row["fingerprint"]) for event_id, row in rows.items())
    claims = {"rows": msgspec.json.encode(names).decode()}
    return {event_id for (event_id,) in cursor.execute(_SQL["insert_event_ids"], claims).fetchall()}


def _claim_id(cursor: Cursor, event_id: UUID, period: str, fingerprint: str | None) -> bool:
    """Whether this fact is the first of its id."""
    cursor.execute(_SQL["insert_event_id"], {"event_id": event_id.hex, "period": period, "fingerprint": fingerprint})
    return cursor.rowcount == 1


def _keep_bodies(
    cursor: Cursor,
    directory: Directory,
    row: dict[str, Any],
    call: Call,
    bodies: Bodies,
    now: datetime,
    *,
    replayable: bool,
    hold_id: UUID | None = None,
) -> None:
    """Keep what a replay answers, and a row of the request log where there is something to log."""
    if replayable and bodies.replay is not None:
        cursor.execute(
            _SQL["insert_replay"],
            {"event_id": row["event_id"], "response": bodies.replay, "stored_at": instant_text(now)},
        )
    if bodies.request is not None or bodies.response is not None or call.error is not None:
        expires_at = directory.log_expiry(cursor, row["account"], now)
        logged = log_row(row, call, bodies, now, hold_id)
        cursor.execute(_SQL["insert_log"], logged | {"expires_at": instant_text(expires_at)})
