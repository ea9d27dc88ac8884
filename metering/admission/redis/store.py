"""The Redis store for threads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metering.admission.redis.drive import drive
from metering.admission.redis.keys import shard_of
from metering.admission.redis.later import Later
from metering.admission.redis.link import Link
from metering.admission.redis.shards import check_counters
from metering.admission.redis.verbs import Verbs
from metering.admission.sql import SqlStore
from metering.clock import utc_now

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
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
    from metering.admission.verify import CounterCheck
    from metering.courier import Courier
    from metering.events import Call, UsageEvent
    from metering.ledger import Ledger

__all__ = ["RedisStore"]


class RedisStore:
    """Decides on Redis and keeps `AdmissionStore`'s promises; what it admitted reaches the ledger by the drain.

    `url` is `redis://`, `rediss://` or `redis+cluster://`. What does not go through Redis goes by the `courier`.
    `clock` is for tests: without one the servers' clocks decide.
    """

    def __init__(
        self,
        ledger: Ledger,
        url: str,
        *,
        courier: Courier,
        last_known: LastKnown,
        timeout_s: float = 0.25,
        clock: Callable[[], datetime] | None = None,
        allow_eviction: bool = False,
    ) -> None:
        self.link = Link(url, timeout_s=timeout_s, allow_eviction=allow_eviction)
        self._verbs = Verbs(ledger, self.link, last_known, timeout_s=timeout_s, clock=clock)
        self.later = Later(ledger, self.link, self._verbs, courier, clock or utc_now)
        self._in_ledger = SqlStore(ledger) if clock is None else SqlStore(ledger, clock=clock)

    def admit(self, admission: Admission, now: datetime | None = None) -> Decision:
        """See `AdmissionStore.admit`. Raises `Undecided` where no answer came."""
        decision = drive(self._verbs.admit(admission, now), self.link)
        if decision.allowed and not decision.replayed and decision.hold is None:
            self.later.keep_log(
                decision.account, decision.key_id, admission.call, admission.bodies, event_id=decision.event_id
            )
        return decision

    def settle(self, settlement: Settlement, now: datetime | None = None) -> Settled:
        """See `AdmissionStore.settle`."""
        settled = drive(self._verbs.settle(settlement, now), self.link)
        if not settled.repeated:
            hold = settlement.hold
            self.later.keep_log(
                hold.account,
                hold.key_id,
                settlement.call,
                settlement.bodies,
                event_id=settled.event_id,
                hold_id=hold.hold_id,
            )
        return settled

    def release(self, hold: HoldTicket, call: Call, bodies: Bodies, now: datetime | None = None) -> bool:
        """See `AdmissionStore.release`."""
        was = drive(self._verbs.release(hold, now), self.link)
        if was not in ("settled", "released"):
            self.later.keep_log(hold.account, hold.key_id, call, bodies, event_id=None, hold_id=hold.hold_id)
        return was == "given_back"

    def renew(self, hold: HoldTicket, ttl_s: float, now: datetime | None = None) -> bool:
        """See `AdmissionStore.renew`."""
        return drive(self._verbs.renew(hold, ttl_s, now), self.link)

    def expire(self, now: datetime | None = None) -> int:
        """See `AdmissionStore.expire`."""
        return drive(self._verbs.expire(now), self.link)

    def append(self, events: Sequence[UsageEvent], now: datetime | None = None) -> Appended:
        """See `AdmissionStore.append`. They ask no limits, so the ledger is told and Redis is not."""
        return self._in_ledger.append(events, now)

    def quota(self, account: str, key_id: str | None = None, now: datetime | None = None) -> tuple[LimitStatus, ...]:
        """See `AdmissionStore.quota`."""
        return drive(self._verbs.quota(account, key_id, now), self.link)

    def announce(self) -> None:
        """Tell Redis what has changed in the ledger. Raises `StoreUnavailable`."""
        drive(self._verbs.announce(), self.link)

    def check_counters(self) -> list[CounterCheck]:
        """Every current counter beside a recount. Calls that are made meanwhile may show as differences."""
        return check_counters(self.link, self._verbs)

    def place_of(self, account: str) -> int:
        """The shard of an account: what is away is away for all of one."""
        return shard_of(account)

    def cancel(self, undo: Mapping[str, Any]) -> None:
        """Undo a call, as `Undecided.undo` says it. Raises `StoreUnavailable`."""
        self.later.cancel(undo)

    def close(self) -> None:
        """Close every connection."""
        self.link.close()
