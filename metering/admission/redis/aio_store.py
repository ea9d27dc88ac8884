"""The Redis store for event loops."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from metering.admission.aio import AsyncSqlStore
from metering.admission.protocol import Settled
from metering.admission.redis.aio_link import AsyncLink
from metering.admission.redis.courier import Courier
from metering.admission.redis.drive import drive_async
from metering.admission.redis.link import Link
from metering.admission.redis.verbs import Undecided, Verbs
from metering.clock import utc_now
from metering.errors import InvalidSetting, StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from metering.admission.protocol import (
        Admission,
        Appended,
        Bodies,
        Decision,
        HoldTicket,
        LimitStatus,
        Settlement,
    )
    from metering.events import Call, UsageEvent
    from metering.ledger import Ledger
    from metering.spool import Shipped

__all__ = ["AsyncRedisStore"]


class AsyncRedisStore:
    """As `RedisStore`, awaited; native on the loop. Keeps `AsyncAdmissionStore`'s promises."""

    def __init__(
        self,
        ledger: Ledger,
        url: str,
        *,
        spool: Path,
        timeout_s: float = 0.25,
        clock: Callable[[], datetime] | None = None,
        allow_eviction: bool = False,
    ) -> None:
        self.link = AsyncLink(url, timeout_s=timeout_s, allow_eviction=allow_eviction)
        self._verbs = Verbs(ledger, self.link, timeout_s=timeout_s, clock=clock)
        # What waits is carried by a thread, so it has connections of its own.
        self._thread_link = Link(url, timeout_s=timeout_s, allow_eviction=allow_eviction)
        self._courier = Courier(ledger, self._thread_link, spool, timeout_s=timeout_s, clock=clock)
        self._in_ledger = AsyncSqlStore(ledger, clock=clock or utc_now)

    async def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `AdmissionStore.admit`."""
        try:
            decision = await drive_async(self._verbs.admit(admission, now), self.link)
        except Undecided as exc:
            await asyncio.to_thread(self._courier.keep_cancel, exc.undo)
            raise
        if decision.allowed and not decision.replayed and decision.hold is None:
            self._courier.keep_log(
                decision.account, decision.key_id, admission.call, admission.bodies, event_id=decision.event_id
            )
        return decision

    async def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `AdmissionStore.settle`. What Redis cannot be told now it is told later: `Settled.pending`."""
        order = await drive_async(self._verbs.order_of(settlement), self.link)
        try:
            settled = await drive_async(self._verbs.carry_out(order, now), self.link)
        except (InvalidSetting, StoreUnavailable):
            await asyncio.to_thread(self._courier.keep_settle, order)
            settled = Settled(event_id=settlement.hold.event_id, billable=True, late=False, pending=True)
        if not settled.repeated:
            hold = settlement.hold
            self._courier.keep_log(
                hold.account,
                hold.key_id,
                settlement.call,
                settlement.bodies,
                event_id=settled.event_id,
                hold_id=hold.hold_id,
            )
        return settled

    async def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """See `AdmissionStore.release`."""
        was = await drive_async(self._verbs.release(hold, now), self.link)
        if was not in ("settled", "released"):
            self._courier.keep_log(hold.account, hold.key_id, call, bodies, event_id=None, hold_id=hold.hold_id)
        return was == "given_back"

    async def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """See `AdmissionStore.renew`."""
        return await drive_async(self._verbs.renew(hold, ttl_s, now), self.link)

    async def expire(self, now: datetime | None = None) -> int:
        """See `AdmissionStore.expire`."""
        return await drive_async(self._verbs.expire(now), self.link)

    async def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """See `AdmissionStore.append`. They ask no limits, so the ledger is told and Redis is not."""
        return await self._in_ledger.append(events, now)

    async def quota(
        self, account: str, key_id: str | None = None, now: datetime | None = None
    ) -> tuple[LimitStatus, ...]:
        """See `AdmissionStore.quota`."""
        return await drive_async(self._verbs.quota(account, key_id, now), self.link)

    async def announce(self) -> None:
        """Tell Redis what has changed in the ledger. Raises `StoreUnavailable`."""
        await drive_async(self._verbs.announce(), self.link)

    async def flush(self) -> Shipped:
        """Carry what waits in the spool. Raises `StoreUnavailable` where the ledger is away."""
        return await asyncio.to_thread(self._courier.ship)

    async def aclose(self) -> None:
        """Ship what waits, as far as it can be, and close every connection."""
        await asyncio.to_thread(self._courier.close)
        self._thread_link.close()
        await self.link.aclose()
