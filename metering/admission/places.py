"""Where quotas are decided, if not in the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from metering.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from metering.admission.last_known import LastKnown
    from metering.admission.redis.aio_store import AsyncRedisStore
    from metering.admission.redis.link import Link
    from metering.admission.redis.store import RedisStore
    from metering.courier import Courier
    from metering.ledger import Ledger

__all__ = ["QuotaPlace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaPlace:
    """A Redis, and how it is asked. Raises `InvalidSetting` where the extra `redis` is not installed."""

    url: str
    timeout_s: float
    clock: Callable[[], datetime] | None = None
    """None: the servers' own."""
    allow_eviction: bool = False

    def __post_init__(self) -> None:
        try:
            import hiredis  # noqa: F401, PLC0415  an app without Redis need not have it
            import redis  # noqa: F401, PLC0415
        except ImportError as exc:
            raise InvalidSetting("METERING_QUOTA_URL", "a Redis URL", "pip install 'tallystick[redis]'") from exc

    def link(self) -> Link:
        """Connections to it, for threads."""
        from metering.admission.redis.link import Link  # noqa: PLC0415

        return Link(self.url, timeout_s=self.timeout_s, allow_eviction=self.allow_eviction)

    def open(self, ledger: Ledger, courier: Courier, last_known: LastKnown) -> RedisStore:
        """Its store for threads."""
        from metering.admission.redis.store import RedisStore  # noqa: PLC0415

        return RedisStore(
            ledger,
            self.url,
            courier=courier,
            last_known=last_known,
            timeout_s=self.timeout_s,
            clock=self.clock,
            allow_eviction=self.allow_eviction,
        )

    def open_async(self, ledger: Ledger, blocking: RedisStore, last_known: LastKnown) -> AsyncRedisStore:
        """Its store for event loops; `blocking` is told what goes by the spool."""
        from metering.admission.redis.aio_store import AsyncRedisStore  # noqa: PLC0415

        return AsyncRedisStore(
            ledger,
            self.url,
            later=blocking.later,
            last_known=last_known,
            timeout_s=self.timeout_s,
            clock=self.clock,
            allow_eviction=self.allow_eviction,
        )
