"""Where quotas are decided, if not in the ledger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from metering.errors import InvalidSetting

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from metering.admission.redis.aio_store import AsyncRedisStore
    from metering.admission.redis.store import RedisStore
    from metering.ledger import Ledger

__all__ = ["QuotaPlace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuotaPlace:
    """A Redis, and how it is asked. Raises `InvalidSetting` where the extra `redis` is not installed."""

    url: str
    timeout_s: float
    spool: Path
    clock: Callable[[], datetime] | None = None
    """None: the servers' own."""
    allow_eviction: bool = False

    def __post_init__(self) -> None:
        try:
            import hiredis  # noqa: F401, PLC0415  an app without Redis need not have it
            import redis  # noqa: F401, PLC0415
        except ImportError as exc:
            raise InvalidSetting("METERING_QUOTA_URL", "a Redis URL", "pip install 'tallystick[redis]'") from exc

    def open(self, ledger: Ledger) -> RedisStore:
        """Its store for threads."""
        from metering.admission.redis.store import RedisStore  # noqa: PLC0415

        return RedisStore(
            ledger,
            self.url,
            spool=self.spool,
            timeout_s=self.timeout_s,
            clock=self.clock,
            allow_eviction=self.allow_eviction,
        )

    def open_async(self, ledger: Ledger) -> AsyncRedisStore:
        """Its store for event loops."""
        from metering.admission.redis.aio_store import AsyncRedisStore  # noqa: PLC0415

        return AsyncRedisStore(
            ledger,
            self.url,
            spool=self.spool,
            timeout_s=self.timeout_s,
            clock=self.clock,
            allow_eviction=self.allow_eviction,
        )
