"""Stores that are told later what they cannot be told now: settles, signals, and calls of plans that fail open."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from metering.admission.protocol import AdmissionStore, Decision, HoldTicket, Settled, Settlement, Undecided
from metering.errors import (
    InvalidEvent,
    InvalidSetting,
    MeteringError,
    RevokedKey,
    SettleConflict,
    StoreUnavailable,
    UnknownKey,
)
from metering.events import TokenUsage, UsageEvent, derive_event_id, new_event_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from metering.admission.last_known import LastKnown
    from metering.admission.protocol import (
        Admission,
        Appended,
        AsyncAdmissionStore,
        Bodies,
        LimitStatus,
    )
    from metering.courier import Courier
    from metering.events import Call
    from metering.spool import Line

__all__ = ["AsyncPatientStore", "PatientStore"]

logger = logging.getLogger("metering")


@dataclass(frozen=True, slots=True, kw_only=True)
class _KeptSettle:
    """A settle that waits. `undo` comes before it: what a call that was admitted unchecked may have left behind."""

    settlement: Settlement
    undo: dict[str, Any] | None = None


_settles = msgspec.msgpack.Decoder(_KeptSettle)
_signals = msgspec.msgpack.Decoder(UsageEvent)


class _PatientlyTold(AdmissionStore, Protocol):
    """What is asked of a store besides."""

    def place_of(self, account: str) -> object:
        """Where an account is decided: what is away is away for all of one place."""

    def cancel(self, undo: dict[str, Any]) -> None:
        """Undo a call, as `Undecided.undo` says it. Raises `StoreUnavailable`."""


class PatientStore:
    """Another store, and a courier for what that cannot be told while it is away."""

    def __init__(self, store: _PatientlyTold, courier: Courier, last_known: LastKnown) -> None:
        self._store = store
        self._courier = courier
        self._last_known = last_known
        courier.carries("settle", self._deliver_settles)
        courier.carries("signal", self._deliver_signals)
        courier.begin()

    def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `AdmissionStore.admit`. Where the plan fails open, the call is admitted though the store is away."""
        try:
            return self._store.admit(admission, now)
        except (RevokedKey, UnknownKey):
            self._last_known.forget(admission.key_digest)
            raise
        except StoreUnavailable as exc:
            decision = self.unchecked(admission, exc, now)
            if decision is None:
                raise
            return decision

    def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `AdmissionStore.settle`. What the store cannot be told now it is told later: `Settled.pending`."""
        try:
            return self._store.settle(settlement, now)
        except (InvalidSetting, StoreUnavailable):
            return self.settled_later(settlement)

    def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """See `AdmissionStore.release`."""
        return self._store.release(hold, call, bodies, now)

    def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """See `AdmissionStore.renew`."""
        return self._store.renew(hold, ttl_s, now)

    def expire(self, now: datetime | None = None) -> int:
        """See `AdmissionStore.expire`."""
        return self._store.expire(now)

    def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """See `AdmissionStore.append`."""
        return self._store.append(events, now)

    def quota(self, account: str, key_id: str | None = None, now: datetime | None = None) -> tuple[LimitStatus, ...]:
        """See `AdmissionStore.quota`."""
        return self._store.quota(account, key_id, now)

    def forget(self, digest: str) -> None:
        """The store has refused this key."""
        self._last_known.forget(digest)

    def append_later(self, signal: UsageEvent) -> None:
        """Keep a signal until the ledger is back. Raises `StoreUnavailable` where it cannot be kept either."""
        self._courier.keep("signal", signal.event_id, msgspec.msgpack.encode(signal))

    def settled_later(self, settlement: Settlement, undo: dict[str, Any] | None = None) -> Settled:
        """Keep a settle until the store is back. Raises `StoreUnavailable` where it cannot be kept either."""
        kept = msgspec.msgpack.encode(_KeptSettle(settlement=settlement, undo=undo))
        self._courier.keep("settle", settlement.hold.hold_id, kept)
        return Settled(event_id=settlement.hold.event_id, billable=True, late=False, pending=True)

    def unchecked(self, admission: Admission, error: StoreUnavailable, now: datetime | None = None) -> Decision | None:
        """What a call is answered without its store; None where it fails closed. What may have been done is undone."""
        undo = error.undo if isinstance(error, Undecided) else None
        found = self._last_known.find(admission.key_digest, now)
        is_hold = admission.hold_ttl_s is not None
        if undo is not None and (found is None or is_hold):
            self._courier.keep("cancel", admission.event_id, msgspec.msgpack.encode(undo))
        if found is None:
            return None
        terms, at = found
        key = admission.call.idempotency_key
        hold = HoldTicket(
            hold_id=new_event_id(),
            event_id=(
                admission.event_id if key is None else derive_event_id("usage", terms.account, admission.call.line, key)
            ),
            account=terms.account,
            key_id=terms.key_id,
            plan_version=terms.plan_version,
            period=terms.period_label,
            admitted_at=at,
            expires_at=at + timedelta(seconds=admission.hold_ttl_s or 0),
            usage=admission.usage,
            quantity=admission.quantity,
            fingerprint=admission.fingerprint,
        )
        if not is_hold:
            settlement = Settlement(
                hold=hold,
                call=admission.call,
                usage=admission.usage or TokenUsage(),
                quantity=admission.quantity or Decimal(0),
                bodies=admission.bodies,
            )
            self.settled_later(settlement, undo)
        return Decision(
            allowed=True,
            event_id=hold.event_id,
            account=terms.account,
            plan=terms.plan.name,
            plan_version=terms.plan_version,
            key_id=terms.key_id,
            hold=hold if is_hold else None,
            unchecked=True,
        )

    def _deliver_settles(self, lines: list[Line]) -> list[Line]:
        left: list[Line] = []
        away: set[object] = set()
        for line in lines:
            place: object = None
            try:
                kept = _settles.decode(line.payload)
                place = self._store.place_of(kept.settlement.hold.account)
                if place in away:
                    left.append(line)
                    continue
                if kept.undo is not None:
                    self._store.cancel(kept.undo)
                self._settle_now(kept.settlement)
            except (InvalidSetting, StoreUnavailable):
                away.add(place)
                left.append(line)
            except SettleConflict:
                logger.exception("a settle of hold %s came too late", line.event_id)
            except Exception:
                logger.exception("hold %s could not be settled; it stays in the spool", line.event_id)
                left.append(line)
        return left

    def _settle_now(self, settlement: Settlement) -> None:
        try:
            self._store.settle(settlement)
        except InvalidEvent:
            # The work was done, and nobody is there to say it better: what an estimate need not name is billed.
            logger.exception("hold %s leaves out what its plan's rates need", settlement.hold.hold_id)
            self._store.settle(replace(settlement, estimated=True))

    def _deliver_signals(self, lines: list[Line]) -> list[Line]:
        try:
            self._store.append([_signals.decode(line.payload) for line in lines])
        except StoreUnavailable:
            return lines
        except (MeteringError, msgspec.MsgspecError):
            # All or none: one that cannot be kept must not keep the others out.
            return [line for line in lines if not self._is_done(line)]
        return []

    def _is_done(self, line: Line) -> bool:
        try:
            self._store.append([_signals.decode(line.payload)])
        except StoreUnavailable:
            return False
        except msgspec.MsgspecError:
            logger.exception("signal %s cannot be read; it stays in the spool", line.event_id)
            return False
        except MeteringError:
            logger.exception("signal %s was dropped", line.event_id)
        return True


class AsyncPatientStore:
    """As `PatientStore`, awaited. `patient` keeps what has to wait."""

    def __init__(self, store: AsyncAdmissionStore, patient: PatientStore) -> None:
        self._store = store
        self._patient = patient

    async def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `PatientStore.admit`."""
        try:
            return await self._store.admit(admission, now)
        except (RevokedKey, UnknownKey):
            self._patient.forget(admission.key_digest)
            raise
        except StoreUnavailable as exc:
            decision = await asyncio.to_thread(self._patient.unchecked, admission, exc, now)
            if decision is None:
                raise
            return decision

    async def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `PatientStore.settle`."""
        try:
            return await self._store.settle(settlement, now)
        except (InvalidSetting, StoreUnavailable):
            return await asyncio.to_thread(self._patient.settled_later, settlement)

    async def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """See `AdmissionStore.release`."""
        return await self._store.release(hold, call, bodies, now)

    async def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """See `AdmissionStore.renew`."""
        return await self._store.renew(hold, ttl_s, now)

    async def expire(self, now: datetime | None = None) -> int:
        """See `AdmissionStore.expire`."""
        return await self._store.expire(now)

    async def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """See `AdmissionStore.append`."""
        return await self._store.append(events, now)

    async def append_later(self, signal: UsageEvent) -> None:
        """See `PatientStore.append_later`."""
        await asyncio.to_thread(self._patient.append_later, signal)

    async def quota(
        self, account: str, key_id: str | None = None, now: datetime | None = None
    ) -> tuple[LimitStatus, ...]:
        """See `AdmissionStore.quota`."""
        return await self._store.quota(account, key_id, now)
