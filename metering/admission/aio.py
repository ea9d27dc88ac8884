"""The SQL store for event loops: the same works as `SqlStore`, run by the ledger's writer on a thread of its own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from metering.admission.directory import Directory
from metering.admission.sql import SqlStore, SqlWorks
from metering.clock import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from metering.admission.last_known import LastKnown
    from metering.admission.protocol import (
        Admission,
        Appended,
        Bodies,
        Decision,
        HoldTicket,
        LimitStatus,
        Settled,
        Settlement,
    )
    from metering.events import Call, UsageEvent
    from metering.ledger import Ledger

__all__ = ["AsyncSqlStore"]


class AsyncSqlStore:
    """Decides on the ledger, awaited. Keeps `AsyncAdmissionStore`'s promises; `clock` is the store's own time."""

    def __init__(
        self, ledger: Ledger, last_known: LastKnown | None = None, *, clock: Callable[[], datetime] = utc_now
    ) -> None:
        self._ledger = ledger
        self._works = SqlWorks(Directory(), clock, last_known)
        self._reads = SqlStore(ledger, clock=clock)

    async def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `AdmissionStore.admit`."""
        return await self._ledger.writer.run_async(self._works.admit(admission, now))

    async def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `AdmissionStore.settle`."""
        return await self._ledger.writer.run_async(self._works.settle(settlement, now))

    async def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """See `AdmissionStore.release`."""
        return await self._ledger.writer.run_async(self._works.release(hold, call, bodies, now))

    async def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """See `AdmissionStore.renew`."""
        return await self._ledger.writer.run_async(self._works.renew(hold, ttl_s, now))

    async def expire(self, now: datetime | None = None) -> int:
        """See `AdmissionStore.expire`. Works in batches, so that admissions get their turn in between."""
        total = 0
        for account in await asyncio.to_thread(self._reads.accounts_to_sweep, now):
            while expired := await self._ledger.writer.run_async(self._works.expire_batch(account, now)):
                total += expired
        return total

    async def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """See `AdmissionStore.append`."""
        return await self._ledger.writer.run_async(self._works.append(events, now))

    async def quota(
        self, account: str, key_id: str | None = None, now: datetime | None = None
    ) -> tuple[LimitStatus, ...]:
        """See `AdmissionStore.quota`."""
        return await asyncio.to_thread(self._reads.quota, account, key_id, now)
