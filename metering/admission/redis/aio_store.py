"""The Redis store for event loops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from metering.admission.aio import AsyncSqlStore
from metering.admission.redis.aio_link import AsyncLink
from metering.admission.redis.drive import drive_async
from metering.admission.redis.verbs import Verbs
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
    from metering.admission.redis.later import Later
    from metering.events import Call, UsageEvent
    from metering.ledger import Ledger

__all__ = ["AsyncRedisStore"]


class AsyncRedisStore:
    """As `RedisStore`, awaited; native on the loop. Keeps `AsyncAdmissionStore`'s promises."""

    def __init__(
        self,
        ledger: Ledger,
        url: str,
        *,
        later: Later,
        last_known: LastKnown,
        timeout_s: float = 0.25,
        clock: Callable[[], datetime] | None = None,
        allow_eviction: bool = False,
    ) -> None:
        self.link = AsyncLink(url, timeout_s=timeout_s, allow_eviction=allow_eviction)
        self._verbs = Verbs(ledger, self.link, last_known, timeout_s=timeout_s, clock=clock)
        self._later = later
        self._in_ledger = AsyncSqlStore(ledger, clock=clock or utc_now)

    async def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `RedisStore.admit`."""
        decision = await drive_async(self._verbs.admit(admission, now), self.link)
        if decision.allowed and not decision.replayed and decision.hold is None:
            self._later.keep_log(
                decision.account, decision.key_id, admission.call, admission.bodies, event_id=decision.event_id
            )
        return decision

    async def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `AdmissionStore.settle`."""
        settled = await drive_async(self._verbs.settle(settlement, now), self.link)
        if not settled.repeated:
            hold = settlement.hold
            self._later.keep_log(
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
            self._later.keep_log(hold.account, hold.key_id, call, bodies, event_id=None, hold_id=hold.hold_id)
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

    async def aclose(self) -> None:
        """Close every connection."""
        await self.link.aclose()
